// Norm + activation of a tensor whose channels lie innermost, in one pass over memory each way.
//
// A tensor is read as rows of channels: channels_last. Every kernel works on rows in chunks of a fixed size, whose
// partial sums are added in order: what comes out does not depend on the number of threads.
// What the operators compute is said in operators.py. Bit k of byte (g, c) of a mask says whether the activation lets
// the gradient of row 8 g + k, number c pass.

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using std::optional;

// The rows of `ChannelMaps` in operators.py, which says what they are, and those of the terms of an input's gradient.
enum Map : int64_t { SLOPE, OFFSET, ZERO, STEP, KEPT_SLOPE, KEPT_OFFSET, KEPT_ZERO };
enum Term : int64_t { ALONG = 1, CONSTANT = 2 };
enum Keep : int64_t { INPUT = 0, BFLOAT16 = 1, BYTE = 2, NOTHING = 3 };

constexpr int64_t CHUNK = 128;  // rows, a multiple of 8
constexpr int64_t BLOCK = 32;   // rows whose sums are held in the type of the tensor, before they go to double
constexpr int64_t WIDTH = 128;  // the least numbers in a row: where channels are fewer, several rows are read as one

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif

// The type that is computed in.
template <typename T> using wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Rounded once, in forward and in backward alike: a mask that is computed again has to be the same mask.
template <typename W> inline W fma_(W a, W b, W c) {
#ifdef __FMA__
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline double exp_(double x) { return std::exp(x); }
// A polynomial that compilers put into vector registers, within 2 units in the last place (Cephes' coefficients).
inline float exp_(float x) {
  x = x < -87.f ? -87.f : (x > 88.f ? 88.f : x);
  float n = std::nearbyint(x * 1.44269504088896341f);
  float r = fma_(n, -0.693359375f, x);
  r = fma_(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fma_(p, r, 1.3981999507e-3f);
  p = fma_(p, r, 8.3334519073e-3f);
  p = fma_(p, r, 4.1665795894e-2f);
  p = fma_(p, r, 1.6666665459e-1f);
  p = fma_(p, r, 5.0000001201e-1f);
  float e = fma_(p, r * r, r + 1.f);
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return e * power;
}

// Activations. One more is one more of these, and its entry in `Activations`.
struct Activation {
  template <typename W> static bool passes(W u) { return u > 0; }  // where a bit is all that the gradient needs of u
};
struct Identity : Activation {
  static constexpr const char* NAME = "identity";
  template <typename W> static W value(W u) { return u; }
  template <typename W> static W slope(W) { return 1; }
};
struct Relu : Activation {
  static constexpr const char* NAME = "relu";
  template <typename W> static W value(W u) { return u <= 0 ? W(0) : u; }  // what is not a number stays so
  template <typename W> static W slope(W u) { return passes(u) ? W(1) : W(0); }
};
struct Relu6 : Activation {
  static constexpr const char* NAME = "relu6";
  template <typename W> static bool passes(W u) { return u > 0 && u < 6; }
  template <typename W> static W value(W u) { return u <= 0 ? W(0) : (u >= 6 ? W(6) : u); }
  template <typename W> static W slope(W u) { return passes(u) ? W(1) : W(0); }
};
struct Silu : Activation {
  static constexpr const char* NAME = "silu";
  template <typename W> static W value(W u) { return u / (1 + exp_(-u)); }
  template <typename W> static W slope(W u) {
    const W s = 1 / (1 + exp_(-u));
    return s * (1 + u * (1 - s));
  }
};
struct Hardswish : Activation {
  static constexpr const char* NAME = "hardswish";
  template <typename W> static W value(W u) { return u * (u > -3 ? (u < 3 ? (u + 3) / 6 : W(1)) : W(0)); }
  template <typename W> static W slope(W u) { return u > -3 ? (u < 3 ? u / 3 + W(0.5) : W(1)) : W(0); }
};

template <typename... A> struct List {};
using Activations = List<Identity, Relu, Relu6, Silu, Hardswish>;

template <typename F, typename... A> void with_act(c10::string_view act, const F& body, List<A...>) {
  const bool known = ((act == A::NAME && (body(A()), true)) || ...);
  TORCH_CHECK(known, "bn_affine_adapters: no kernel for ", act);
}
template <typename F> void with_act(c10::string_view act, const F& body) { with_act(act, body, Activations()); }

template <typename... A> std::vector<std::string> names(List<A...>) { return {A::NAME...}; }
std::vector<std::string> activations() { return names(Activations()); }

inline void put(float* to, float value) { *to = value; }
inline void put(double* to, double value) { *to = value; }
// Rounded to even, without the branch that keeps a loop out of vector registers.
inline void put(at::BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->x = value == value ? static_cast<uint16_t>(rounded) : uint16_t(0x7fc0);
}
inline void put(at::BFloat16* to, double value) { put(to, static_cast<float>(value)); }

// A tensor as rows: `together` of its own, of `channels` numbers each, make one of `width` numbers.
struct Shape {
  int64_t channels, together = 1, width, rows, chunks;
  explicit Shape(const Tensor& t) : channels(t.size(1)), rows(t.numel() / t.size(1)) {
    while (channels * together < WIDTH && rows % 2 == 0) together *= 2, rows /= 2;
    width = channels * together;
    chunks = (rows + CHUNK - 1) / CHUNK;
  }
  // A row of numbers per channel as one per number in a row of this shape.
  template <typename W> std::vector<W> tiled(const Tensor& t, int64_t line) const {
    TORCH_CHECK(t.dim() == 2 && t.size(0) > line && t.size(1) == channels, "bn_affine_adapters: no maps: ", t.sizes());
    const Tensor whole = t.contiguous();
    const W* from = whole.const_data_ptr<W>() + line * channels;
    std::vector<W> found;
    found.reserve(width);
    for (int64_t i = 0; i < together; ++i) found.insert(found.end(), from, from + channels);
    return found;
  }
};

template <typename F> void over_rows(int64_t rows, const F& body) {
  at::parallel_for(0, (rows + CHUNK - 1) / CHUNK, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i, i * CHUNK, std::min(rows, (i + 1) * CHUNK));
  });
}

Tensor innermost(const Tensor& t) {
  return t.dim() == 4 ? t.contiguous(at::MemoryFormat::ChannelsLast) : t.contiguous();
}

template <typename T> const T* data(const Tensor& t) { return t.const_data_ptr<T>(); }
template <typename T> const T* data(const optional<Tensor>& t) { return t ? t->const_data_ptr<T>() : nullptr; }

template <typename F> void with_flag(bool flag, const F& body) {
  flag ? body(std::true_type()) : body(std::false_type());
}

template <typename F> void with_type(const Tensor& t, const F& body) {
  switch (t.scalar_type()) {
    case at::kFloat: return body(float());
    case at::kDouble: return body(double());
    case at::kBFloat16: return body(at::BFloat16());
    default: TORCH_CHECK(false, "bn_affine_adapters: no kernel for ", t.scalar_type());
  }
}

// Adds four rows, less a shift, and their squares: a sum that starts near the mean loses no digits.
template <typename T, typename W>
inline void add_rows(const T* __restrict x, int64_t width, const W* __restrict shift, W* __restrict sum,
                     W* __restrict square) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    const W p = W(x[c]) - shift[c], q = W(x[width + c]) - shift[c];
    const W r = W(x[2 * width + c]) - shift[c], t = W(x[3 * width + c]) - shift[c];
    sum[c] += (p + q) + (r + t);
    square[c] += (p * p + q * q) + (r * r + t * t);
  }
}
template <typename T, typename W>
inline void add_row(const T* __restrict x, int64_t width, const W* __restrict shift, W* __restrict sum,
                    W* __restrict square) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    const W p = W(x[c]) - shift[c];
    sum[c] += p;
    square[c] += p * p;
  }
}
template <typename T, typename W>
inline void widen(const T* __restrict x, int64_t width, W* __restrict low, W* __restrict high) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    const W v = x[c];
    low[c] = v < low[c] ? v : low[c];
    high[c] = v > high[c] ? v : high[c];
  }
}

// Mean and biased variance of each channel, and its least and greatest value if asked for: (2 or 4, C).
Tensor stats(const Tensor& z, bool range) {
  const Tensor input = innermost(z);
  const Shape s(input);
  const int64_t width = s.width, kinds = range ? 4 : 2;
  std::vector<double> partial(s.chunks * kinds * width);
  Tensor out = at::empty({kinds, s.channels}, input.options().dtype(at::toOpMathType(input.scalar_type())));
  with_type(input, [&](auto type) {
    using T = decltype(type);
    using W = wide<T>;
    const T* x = data<T>(input);
    over_rows(s.rows, [&](int64_t index, int64_t from, int64_t to) {
      constexpr W infinity = std::numeric_limits<W>::infinity();
      std::vector<W> shift(width), sum(width), square(width), low(width, infinity), high(width, -infinity);
      double* total = &partial[index * kinds * width];
      for (int64_t c = 0; c < width; ++c) shift[c] = x[from * width + c];
      for (int64_t begin = from; begin < to; begin += BLOCK) {
        std::fill(sum.begin(), sum.end(), W(0));
        std::fill(square.begin(), square.end(), W(0));
        const int64_t end = std::min(to, begin + BLOCK);
        for (int64_t row = begin; row < end; row += row + 4 <= end ? 4 : 1) {
          const auto add = row + 4 <= end ? add_rows<T, W> : add_row<T, W>;
          add(x + row * width, width, shift.data(), sum.data(), square.data());
        }
        if (range)
          for (int64_t row = begin; row < end; ++row) widen(x + row * width, width, low.data(), high.data());
        for (int64_t c = 0; c < width; ++c) total[c] += sum[c], total[width + c] += square[c];
      }
      for (int64_t c = 0; c < width; ++c) {  // to the chunk's mean and its squares about it
        const double mean = total[c] / (to - from);
        total[width + c] -= total[c] * mean;
        total[c] = mean + shift[c];
        if (range) total[2 * width + c] = low[c], total[3 * width + c] = high[c];
      }
    });
    W* result = out.data_ptr<W>();
    for (int64_t c = 0; c < s.channels; ++c) {
      double n = 0, mean = 0, square = 0, low = INFINITY, high = -INFINITY;
      for (int64_t i = 0; i < s.chunks; ++i)  // the rule of Chan, Golub and LeVeque for the variance of parts
        for (int64_t j = 0; j < s.together; ++j) {
          const double* part = &partial[i * kinds * width + j * s.channels + c];
          const double m = std::min(s.rows, (i + 1) * CHUNK) - i * CHUNK, delta = part[0] - mean;
          mean += delta * m / (n + m);
          square += part[width] + delta * delta * n * m / (n + m);
          n += m;
          if (range) low = std::min(low, part[2 * width]), high = std::max(high, part[3 * width]);
        }
      result[c] = mean;
      result[s.channels + c] = square < 0 ? 0 : square / n;  // what is not a number stays so
      if (range) result[2 * s.channels + c] = low, result[3 * s.channels + c] = high;
    }
  });
  return out;
}

template <typename A, bool ADDS, bool MASKS, typename T, typename W>
inline void forward_row(const T* __restrict x, const T* __restrict add, int64_t width, const W* __restrict slope,
                        const W* __restrict offset, T* __restrict y, uint8_t* __restrict byte, int k) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    W u = fma_(W(x[c]), slope[c], offset[c]);
    if constexpr (ADDS) u += W(add[c]);
    put(y + c, A::value(u));
    if constexpr (MASKS) byte[c] |= static_cast<uint8_t>(static_cast<uint32_t>(A::passes(u)) << k);
  }
}
template <typename T, typename W>
inline void keep_row(const T* __restrict x, int64_t width, const W* __restrict zero, const W* __restrict step,
                     at::BFloat16* __restrict to) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) put(to + c, (W(x[c]) - zero[c]) * step[c]);
}
template <typename T, typename W>
inline void keep_row(const T* __restrict x, int64_t width, const W* __restrict zero, const W* __restrict step,
                     uint8_t* __restrict to) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    const W v = fma_(W(x[c]) - zero[c], step[c], W(0.5));
    to[c] = static_cast<uint8_t>(static_cast<int32_t>(v > 0 ? (v < 255 ? v : W(255)) : W(0)));
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& z, const optional<Tensor>& residual, const Tensor& maps,
                                           c10::string_view act, int64_t keep, bool with_mask) {
  const Tensor input = innermost(z);
  const Shape s(input);
  const int64_t width = s.width;
  optional<Tensor> other;
  if (residual) other = innermost(residual->to(input.scalar_type()));
  Tensor y = at::empty_like(input);
  const auto halves_type = input.options().dtype(at::kBFloat16), codes_type = input.options().dtype(at::kByte);
  Tensor half = keep == BFLOAT16 ? at::empty_like(input, halves_type) : at::empty({0}, halves_type);
  Tensor code = keep == BYTE ? at::empty_like(input, codes_type) : at::empty({0}, codes_type);
  Tensor mask = at::zeros({with_mask ? (s.rows + 7) / 8 : 0, width}, input.options().dtype(at::kByte));
  with_type(input, [&](auto type) {
    using T = decltype(type);
    using W = wide<T>;
    const T *x = data<T>(input), *r = data<T>(other);
    const auto slopes = s.tiled<W>(maps, SLOPE), offsets = s.tiled<W>(maps, OFFSET);
    const auto zeros = s.tiled<W>(maps, ZERO), steps = s.tiled<W>(maps, STEP);
    const W *p = slopes.data(), *q = offsets.data(), *o = zeros.data(), *t = steps.data();
    T* out = y.data_ptr<T>();
    auto* halves = half.data_ptr<at::BFloat16>();
    auto *codes = code.data_ptr<uint8_t>(), *bits = mask.data_ptr<uint8_t>();
    with_act(act, [&](auto which) {
      with_flag(r != nullptr, [&](auto adds) {
        with_flag(with_mask, [&](auto masks) {
          over_rows(s.rows, [&](int64_t, int64_t from, int64_t to) {
            for (int64_t row = from, at = from * width; row < to; ++row, at += width) {
              uint8_t* byte = masks ? bits + row / 8 * width : nullptr;
              forward_row<decltype(which), decltype(adds)::value, decltype(masks)::value>(
                  x + at, adds ? r + at : nullptr, width, p, q, out + at, byte, row % 8);
              if (keep == BFLOAT16) keep_row(x + at, width, o, t, halves + at);
              if (keep == BYTE) keep_row(x + at, width, o, t, codes + at);
            }
          });
        });
      });
    });
  });
  return {y, keep == BYTE ? code : half, mask};
}

// Calls body with the types of what was kept and of the gradient, the activation, and whether a mask stands for it.
template <typename F>
void with_kinds(const Tensor& kept, const Tensor& dy, const optional<Tensor>& mask, c10::string_view act,
                const F& body) {
  with_type(dy, [&](auto type) {
    using T = decltype(type);
    const auto with_kept = [&](auto k) {
      if (mask) return body(k, T(), Relu(), std::true_type());
      with_act(act, [&](auto which) { body(k, T(), which, std::false_type()); });
    };
    if (kept.scalar_type() == at::kByte) return with_kept(uint8_t());
    if (kept.scalar_type() == at::kBFloat16) return with_kept(at::BFloat16());
    TORCH_CHECK(kept.scalar_type() == at::toOpMathType(dy.scalar_type()), "bn_affine_adapters: no kernel for ",
                kept.scalar_type(), " and ", dy.scalar_type());
    with_kept(wide<T>());
  });
}

// The gradient of the activation's input, at one value.
template <typename A, bool MASKED, typename W>
inline W through(W dy, W kept, W slope, W offset, uint8_t byte, int k) {
  if constexpr (MASKED) return (byte >> k) & 1 ? dy : W(0);
  return dy * A::slope(fma_(kept, slope, offset));
}

template <typename A, bool MASKED, bool WRITES, typename K, typename G, typename T, typename W>
inline void sum_row(const K* __restrict x, const G* __restrict dy, int64_t width, const W* __restrict slope,
                    const W* __restrict offset, const W* __restrict zero, const uint8_t* __restrict byte, int k,
                    T* __restrict du, W* __restrict sum, W* __restrict product) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    const W v = W(x[c]), d = through<A, MASKED>(W(dy[c]), v, slope[c], offset[c], MASKED ? byte[c] : uint8_t(0), k);
    if constexpr (WRITES) put(du + c, d);
    sum[c] += d;
    product[c] += d * (v - zero[c]);
  }
}

template <typename T, typename W>
inline void add_gradients(const T* __restrict a, const T* __restrict b, int64_t width, W* __restrict to) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) to[c] = W(a[c]) + W(b[c]);
}

std::tuple<Tensor, Tensor> sums(const Tensor& dy_, const Tensor& kept_, const optional<Tensor>& mask,
                                const Tensor& maps, c10::string_view act, bool want_du,
                                const optional<Tensor>& dy2) {
  const Tensor dy = innermost(dy_), kept = innermost(kept_), other = dy2 ? innermost(*dy2) : Tensor();
  const Shape s(dy);
  const int64_t width = s.width;
  Tensor du = want_du ? at::empty_like(dy) : at::empty({0}, dy.options());
  Tensor out = at::zeros({2, s.channels}, maps.options());
  std::vector<double> partial(s.chunks * 2 * width);
  with_kinds(kept, dy, mask, act, [&](auto kind, auto type, auto which, auto masked) {
    using K = decltype(kind);
    using T = decltype(type);
    using W = wide<T>;
    const K* x = data<K>(kept);
    const T* g = data<T>(dy);
    const T* h = dy2 ? data<T>(other) : nullptr;
    T* written = du.data_ptr<T>();
    const uint8_t* bits = data<uint8_t>(mask);
    const auto slopes = s.tiled<W>(maps, KEPT_SLOPE), offsets = s.tiled<W>(maps, KEPT_OFFSET);
    const auto zeros = s.tiled<W>(maps, KEPT_ZERO);
    const W *p = slopes.data(), *q = offsets.data(), *o = zeros.data();
    with_flag(want_du, [&](auto writes) {
      over_rows(s.rows, [&](int64_t index, int64_t from, int64_t to) {
        std::vector<W> room(2 * width);
        std::vector<W> both(dy2 ? width : 0);
        double* total = &partial[index * 2 * width];
        for (int64_t begin = from; begin < to; begin += BLOCK) {
          std::fill(room.begin(), room.end(), W(0));
          for (int64_t row = begin, at = begin * width; row < std::min(to, begin + BLOCK); ++row, at += width) {
            const auto add_row = [&](const auto* gradient) {
              sum_row<decltype(which), decltype(masked)::value, decltype(writes)::value>(
                  x + at, gradient, width, p, q, o, masked ? bits + row / 8 * width : nullptr, row % 8,
                  writes ? written + at : nullptr, room.data(), room.data() + width);
            };
            if (!dy2) {
              add_row(g + at);
            } else {
              add_gradients(g + at, h + at, width, both.data());
              add_row(static_cast<const W*>(both.data()));
            }
          }
          for (int64_t c = 0; c < 2 * width; ++c) total[c] += room[c];
        }
      });
    });
    W* result = out.data_ptr<W>();
    for (int64_t which_sum = 0; which_sum < 2; ++which_sum)
      for (int64_t c = 0; c < s.channels; ++c) {
        double total = 0;
        for (int64_t i = 0; i < s.chunks; ++i)
          for (int64_t j = 0; j < s.together; ++j) total += partial[(i * 2 + which_sum) * width + j * s.channels + c];
        result[which_sum * s.channels + c] = total;
      }
  });
  return {out, du};
}

template <typename A, bool MASKED, typename K, typename T, typename W>
inline void input_row(const K* __restrict x, const T* __restrict dy, int64_t width, const W* __restrict slope,
                      const W* __restrict offset, const W* __restrict zero, const uint8_t* __restrict byte, int k,
                      const W* __restrict by, const W* __restrict along, const W* __restrict constant,
                      T* __restrict dz) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    const W v = W(x[c]), d = through<A, MASKED>(W(dy[c]), v, slope[c], offset[c], MASKED ? byte[c] : uint8_t(0), k);
    put(dz + c, fma_(d, by[c], fma_(v - zero[c], along[c], constant[c])));
  }
}

Tensor input_gradient(const Tensor& dy_, const Tensor& kept_, const optional<Tensor>& mask, const Tensor& maps,
                      c10::string_view act, const Tensor& terms) {
  const Tensor dy = innermost(dy_), kept = innermost(kept_);
  const Shape s(dy);
  const int64_t width = s.width;
  Tensor dz = at::empty_like(dy);
  with_kinds(kept, dy, mask, act, [&](auto kind, auto type, auto which, auto masked) {
    using K = decltype(kind);
    using T = decltype(type);
    using W = wide<T>;
    const K* x = data<K>(kept);
    const T* g = data<T>(dy);
    T* out = dz.data_ptr<T>();
    const uint8_t* bits = data<uint8_t>(mask);
    const auto slopes = s.tiled<W>(maps, KEPT_SLOPE), offsets = s.tiled<W>(maps, KEPT_OFFSET);
    const auto zeros = s.tiled<W>(maps, KEPT_ZERO);
    const W *p = slopes.data(), *q = offsets.data(), *o = zeros.data();
    const auto bys = s.tiled<W>(maps, SLOPE), alongs = s.tiled<W>(terms, ALONG);
    const auto constants = s.tiled<W>(terms, CONSTANT);
    const W *b = bys.data(), *a = alongs.data(), *d = constants.data();
    over_rows(s.rows, [&](int64_t, int64_t from, int64_t to) {
      for (int64_t row = from, at = from * width; row < to; ++row, at += width)
        input_row<decltype(which), decltype(masked)::value>(
            x + at, g + at, width, p, q, o, masked ? bits + row / 8 * width : nullptr, row % 8, b, a, d, out + at);
    });
  });
  return dz;
}

template <typename A, typename K, typename W>
inline void restore_row(const K* __restrict x, int64_t width, const W* __restrict slope, const W* __restrict offset,
                        W* __restrict y) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) y[c] = A::value(fma_(W(x[c]), slope[c], offset[c]));
}

Tensor restore(const Tensor& kept_, const Tensor& maps, c10::string_view act) {
  const Tensor kept = innermost(kept_);
  const Shape s(kept);
  Tensor y = at::empty_like(kept, kept.options().dtype(maps.scalar_type()));
  with_kinds(kept, y, optional<Tensor>(), act, [&](auto kind, auto type, auto which, auto) {
    using K = decltype(kind);
    using W = wide<decltype(type)>;
    const K* x = data<K>(kept);
    W* out = y.data_ptr<W>();
    const auto slopes = s.tiled<W>(maps, KEPT_SLOPE), offsets = s.tiled<W>(maps, KEPT_OFFSET);
    const W *p = slopes.data(), *q = offsets.data();
    over_rows(s.rows, [&](int64_t, int64_t from, int64_t to) {
      for (int64_t at = from * s.width; at < to * s.width; at += s.width)
        restore_row<decltype(which)>(x + at, s.width, p, q, out + at);
    });
  });
  return y;
}

}  // namespace

// The schemas of the others are registered by cpp.py, from operators.py.
TORCH_LIBRARY_FRAGMENT(bnaa, m) { m.def("activations() -> str[]", activations); }

TORCH_LIBRARY_IMPL(bnaa, CPU, m) {
  m.impl("stats", stats);
  m.impl("forward", forward);
  m.impl("sums", sums);
  m.impl("input_gradient", input_gradient);
  m.impl("restore", restore);
}
