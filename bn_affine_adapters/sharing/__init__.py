"""An adapter as files.

- ``untrusted.py``: how a file of a stranger's folder is opened: regular, inside, of bounded size (`MAX_BYTES`).
- ``folder.py``: write a folder whole or not at all; read and check an adapter's two files.
- ``compact.py``: the format of compact files, and how one is read.
- ``contents.py``: what an adapter holds, as plain data, and two adapters compared.
- ``paths.py``: paths of this machine, which stay here.
- ``results.py``: the scores that were measured of an adapter.
- ``card.py``, ``card_template.md``: the model card; ``figure.py``: the picture in it.
- ``handwritten.py``: what a person wrote into a card, which is kept.
- ``hub.py``: fetch and push; what each HTTP status of the Hub means: `_ADVICE`.
"""
