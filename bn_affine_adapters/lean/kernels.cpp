// Norm + activation of a tensor whose channels lie innermost, in one pass over memory each way.
//
// A tensor is read as rows of channels: channels_last. Every kernel works on rows in chunks of a fixed size, whose
// partial sums are added in order: what comes out does not depend on the number of threads.
// What forward keeps for backward, `kept`, is the norm's input itself, its normalised value in bfloat16, or 8 bits per
// value; x = (kept - zero) * step is the normalised input, and u = kept * slope + level the activation's input. Bit k
// of byte (g, c) of a mask says whether the activation lets the gradient of row 8 g + k, number c pass.

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using std::optional;

enum Act : int64_t { IDENTITY = 0, RELU = 1, RELU6 = 2, SILU = 3, HARDSWISH = 4 };
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
inline float fma_(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline double fma_(double a, double b, double c) {
#ifdef __FMA__
  return __builtin_fma(a, b, c);
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

template <int64_t ACT, typename W> inline W activate(W u) {
  if constexpr (ACT == RELU) return u <= 0 ? W(0) : u;  // what is not a number stays so, as in PyTorch
  if constexpr (ACT == RELU6) return u <= 0 ? W(0) : (u >= 6 ? W(6) : u);
  if constexpr (ACT == SILU) return u / (1 + exp_(-u));
  if constexpr (ACT == HARDSWISH) return u * (u > -3 ? (u < 3 ? (u + 3) / 6 : W(1)) : W(0));
  return u;
}

template <int64_t ACT, typename W> inline bool passes(W u) {
  if constexpr (ACT == RELU6) return u > 0 && u < 6;
  return u > 0;
}

template <int64_t ACT, typename W> inline W slope_at(W u) {
  if constexpr (ACT == RELU || ACT == RELU6) return passes<ACT>(u) ? W(1) : W(0);
  if constexpr (ACT == SILU) {
    W s = 1 / (1 + exp_(-u));
    return s * (1 + u * (1 - s));
  }
  if constexpr (ACT == HARDSWISH) return u > -3 ? (u < 3 ? u / 3 + W(0.5) : W(1)) : W(0);
  return W(1);
}

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
  // A number per channel as one per number in a row.
  template <typename W> std::vector<W> tiled(const Tensor& t) const {
    const Tensor whole = t.contiguous();
    const W* from = whole.const_data_ptr<W>();
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

template <int64_t V> using Constant = std::integral_constant<int64_t, V>;

template <typename F> void with_act(int64_t act, const F& body) {
  switch (act) {
    case RELU: return body(Constant<RELU>());
    case RELU6: return body(Constant<RELU6>());
    case SILU: return body(Constant<SILU>());
    case HARDSWISH: return body(Constant<HARDSWISH>());
    default: return body(Constant<IDENTITY>());
  }
}

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

template <int64_t ACT, bool ADDS, bool MASKS, typename T, typename W>
inline void forward_row(const T* __restrict x, const T* __restrict add, int64_t width, const W* __restrict slope,
                        const W* __restrict level, T* __restrict y, uint8_t* __restrict byte, int k) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    W u = fma_(W(x[c]), slope[c], level[c]);
    if constexpr (ADDS) u += W(add[c]);
    put(y + c, activate<ACT>(u));
    if constexpr (MASKS) byte[c] |= static_cast<uint8_t>(static_cast<uint32_t>(passes<ACT>(u)) << k);
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

// y = act(z * slope + level (+ residual)); what is kept of z, which is (z - zero) * step; and the mask.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& z, const optional<Tensor>& residual, const Tensor& slope,
                                           const Tensor& level, const Tensor& zero, const Tensor& step, int64_t act,
                                           int64_t keep, bool with_mask) {
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
    const auto slopes = s.tiled<W>(slope), levels = s.tiled<W>(level);
    const auto zeros = s.tiled<W>(zero), steps = s.tiled<W>(step);
    const W *p = slopes.data(), *q = levels.data(), *o = zeros.data(), *t = steps.data();
    T* out = y.data_ptr<T>();
    auto* halves = half.data_ptr<at::BFloat16>();
    auto *codes = code.data_ptr<uint8_t>(), *bits = mask.data_ptr<uint8_t>();
    with_act(act, [&](auto which) {
      with_flag(r != nullptr, [&](auto adds) {
        with_flag(with_mask, [&](auto masks) {
          over_rows(s.rows, [&](int64_t, int64_t from, int64_t to) {
            for (int64_t row = from, at = from * width; row < to; ++row, at += width) {
              uint8_t* byte = masks ? bits + row / 8 * width : nullptr;
              forward_row<decltype(which)::value, decltype(adds)::value, decltype(masks)::value>(
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
void with_kinds(const Tensor& kept, const Tensor& dy, const optional<Tensor>& mask, int64_t act, const F& body) {
  with_type(dy, [&](auto type) {
    using T = decltype(type);
    const auto with_kept = [&](auto k) {
      if (mask) return body(k, T(), Constant<RELU>(), std::true_type());
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
template <int64_t ACT, bool MASKED, typename W>
inline W through(W dy, W kept, W slope, W level, uint8_t byte, int k) {
  if constexpr (MASKED) return (byte >> k) & 1 ? dy : W(0);
  if constexpr (ACT == IDENTITY) return dy;
  return dy * slope_at<ACT>(fma_(kept, slope, level));
}

template <int64_t ACT, bool MASKED, bool WRITES, typename K, typename G, typename T, typename W>
inline void sum_row(const K* __restrict x, const G* __restrict dy, int64_t width, const W* __restrict slope,
                    const W* __restrict level, const W* __restrict zero, const uint8_t* __restrict byte, int k,
                    T* __restrict du, W* __restrict sum, W* __restrict product) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    const W v = W(x[c]), d = through<ACT, MASKED>(W(dy[c]), v, slope[c], level[c], MASKED ? byte[c] : uint8_t(0), k);
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

// Sums over the rows of du and of du * (kept - zero), (2, C); and du itself if asked for, which a residual needs. `more`
// is added to dy: an output that is used twice has two gradients.
std::tuple<Tensor, Tensor> sums(const Tensor& dy_, const Tensor& kept_, const optional<Tensor>& mask,
                                const Tensor& slope, const Tensor& level, const Tensor& zero, int64_t act,
                                bool want_du, const optional<Tensor>& more) {
  const Tensor dy = innermost(dy_), kept = innermost(kept_), other = more ? innermost(*more) : Tensor();
  const Shape s(dy);
  const int64_t width = s.width;
  Tensor du = want_du ? at::empty_like(dy) : at::empty({0}, dy.options());
  Tensor out = at::zeros({2, s.channels}, slope.options());
  std::vector<double> partial(s.chunks * 2 * width);
  with_kinds(kept, dy, mask, act, [&](auto kind, auto type, auto which, auto masked) {
    using K = decltype(kind);
    using T = decltype(type);
    using W = wide<T>;
    const K* x = data<K>(kept);
    const T* g = data<T>(dy);
    const T* h = more ? data<T>(other) : nullptr;
    T* written = du.data_ptr<T>();
    const uint8_t* bits = data<uint8_t>(mask);
    const auto slopes = s.tiled<W>(slope), levels = s.tiled<W>(level), zeros = s.tiled<W>(zero);
    const W *p = slopes.data(), *q = levels.data(), *o = zeros.data();
    with_flag(want_du, [&](auto writes) {
      over_rows(s.rows, [&](int64_t index, int64_t from, int64_t to) {
        std::vector<W> room(2 * width);
        std::vector<W> both(more ? width : 0);
        double* total = &partial[index * 2 * width];
        for (int64_t begin = from; begin < to; begin += BLOCK) {
          std::fill(room.begin(), room.end(), W(0));
          for (int64_t row = begin, at = begin * width; row < std::min(to, begin + BLOCK); ++row, at += width) {
            const auto add_row = [&](const auto* gradient) {
              sum_row<decltype(which)::value, decltype(masked)::value, decltype(writes)::value>(
                  x + at, gradient, width, p, q, o, masked ? bits + row / 8 * width : nullptr, row % 8,
                  writes ? written + at : nullptr, room.data(), room.data() + width);
            };
            if (!more) {
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

template <int64_t ACT, bool MASKED, typename K, typename T, typename W>
inline void input_row(const K* __restrict x, const T* __restrict dy, int64_t width, const W* __restrict slope,
                      const W* __restrict level, const W* __restrict zero, const uint8_t* __restrict byte, int k,
                      const W* __restrict by, const W* __restrict along, const W* __restrict constant,
                      T* __restrict dz) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    const W v = W(x[c]), d = through<ACT, MASKED>(W(dy[c]), v, slope[c], level[c], MASKED ? byte[c] : uint8_t(0), k);
    put(dz + c, fma_(d, by[c], fma_(v - zero[c], along[c], constant[c])));
  }
}

// dz = du * by + (kept - zero) * along + constant, with du from dy as in `sums`.
Tensor input_gradient(const Tensor& dy_, const Tensor& kept_, const optional<Tensor>& mask, const Tensor& slope,
                      const Tensor& level, const Tensor& zero, int64_t act, const Tensor& by, const Tensor& along,
                      const Tensor& constant) {
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
    const auto slopes = s.tiled<W>(slope), levels = s.tiled<W>(level), zeros = s.tiled<W>(zero);
    const W *p = slopes.data(), *q = levels.data(), *o = zeros.data();
    const auto bys = s.tiled<W>(by), alongs = s.tiled<W>(along), constants = s.tiled<W>(constant);
    const W *b = bys.data(), *a = alongs.data(), *d = constants.data();
    over_rows(s.rows, [&](int64_t, int64_t from, int64_t to) {
      for (int64_t row = from, at = from * width; row < to; ++row, at += width)
        input_row<decltype(which)::value, decltype(masked)::value>(
            x + at, g + at, width, p, q, o, masked ? bits + row / 8 * width : nullptr, row % 8, b, a, d, out + at);
    });
  });
  return dz;
}

template <int64_t ACT, typename K, typename W>
inline void restore_row(const K* __restrict x, int64_t width, const W* __restrict slope, const W* __restrict level,
                        W* __restrict y) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) y[c] = activate<ACT>(fma_(W(x[c]), slope[c], level[c]));
}

// act(kept * slope + level) in the type of `slope`: the activation's output from what was kept.
Tensor restore(const Tensor& kept_, const Tensor& slope, const Tensor& level, int64_t act) {
  const Tensor kept = innermost(kept_);
  const Shape s(kept);
  Tensor y = at::empty_like(kept, kept.options().dtype(slope.scalar_type()));
  with_kinds(kept, y, optional<Tensor>(), act, [&](auto kind, auto type, auto which, auto) {
    using K = decltype(kind);
    using W = wide<decltype(type)>;
    const K* x = data<K>(kept);
    W* out = y.data_ptr<W>();
    const auto slopes = s.tiled<W>(slope), levels = s.tiled<W>(level);
    const W *p = slopes.data(), *q = levels.data();
    over_rows(s.rows, [&](int64_t, int64_t from, int64_t to) {
      for (int64_t at = from * s.width; at < to * s.width; at += s.width)
        restore_row<decltype(which)::value>(x + at, s.width, p, q, out + at);
    });
  });
  return y;
}

// LayerNorm over the last axis. A row's sums are taken in LANES parts, as vector registers do.
constexpr int64_t LANES = 16;

template <typename W, typename F> inline W sum_of(int64_t width, const F& value) {
  W parts[LANES] = {};
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES)
    for (int64_t j = 0; j < LANES; ++j) parts[j] += value(c + j);
  W total = 0;
  for (; c < width; ++c) total += value(c);
  for (int64_t j = 0; j < LANES; ++j) total += parts[j];
  return total;
}

// The least of the numbers times a sign.
template <typename W> inline W least_of(const W* __restrict x, int64_t width, W sign) {
  W parts[LANES];
  std::fill(parts, parts + LANES, std::numeric_limits<W>::infinity());
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES)
    for (int64_t j = 0; j < LANES; ++j) parts[j] = sign * x[c + j] < parts[j] ? sign * x[c + j] : parts[j];
  for (; c < width; ++c) parts[0] = sign * x[c] < parts[0] ? sign * x[c] : parts[0];
  return *std::min_element(parts, parts + LANES);
}

inline void keep_value(at::BFloat16* to, float value, float, float) { put(to, value); }
inline void keep_value(at::BFloat16* to, double value, double, double) { put(to, value); }
template <typename W> inline void keep_value(uint8_t* to, W value, W low, W per_step) {
  const W v = fma_(value - low, per_step, W(0.5));
  *to = static_cast<uint8_t>(static_cast<int32_t>(v > 0 ? (v < 255 ? v : W(255)) : W(0)));
}

template <typename F> void with_rounded(int64_t keep, const F& body) {
  keep == BYTE ? body(uint8_t()) : body(at::BFloat16());
}

// The output, the normalised input x as it is kept, of 8 bits each row's least value and step, and one over the
// standard deviation of each row.
std::tuple<Tensor, Tensor, Tensor, Tensor> row_forward(const Tensor& z, const Tensor& gamma, const Tensor& beta,
                                                       double eps, int64_t keep) {
  const Tensor input = z.contiguous(), g = gamma.contiguous(), b = beta.contiguous();
  const int64_t width = input.size(-1), rows = input.numel() / width;
  auto column = input.sizes().vec();
  column.back() = 1;
  Tensor y = at::empty_like(input), inverse = at::empty(column, g.options());
  Tensor kept = at::empty_like(input, input.options().dtype(keep == BYTE ? at::kByte : at::kBFloat16));
  column.back() = keep == BYTE ? 2 : 0;
  Tensor scale = at::empty(column, g.options());
  with_type(input, [&](auto type) {
    using T = decltype(type);
    using W = wide<T>;
    with_rounded(keep, [&](auto kind) {
      using K = decltype(kind);
      const T* from = data<T>(input);
      const W *p = data<W>(g), *q = data<W>(b);
      T* out = y.data_ptr<T>();
      K* codes = kept.data_ptr<K>();
      W *inverses = inverse.data_ptr<W>(), *scales = scale.data_ptr<W>();
      over_rows(rows, [&](int64_t, int64_t first, int64_t last) {
        std::vector<W> line(width);
        W* __restrict x = line.data();
        for (int64_t row = first; row < last; ++row) {
          const T* __restrict in = from + row * width;
          T* __restrict write = out + row * width;
          K* __restrict code = codes + row * width;
          const W mean = sum_of<W>(width, [&](int64_t c) { return W(in[c]); }) / width;
          const W square = sum_of<W>(width, [&](int64_t c) { return (W(in[c]) - mean) * (W(in[c]) - mean); });
          const W factor = inverses[row] = 1 / std::sqrt(square / width + W(eps));
          W low = 0, step = 1;
          for (int64_t c = 0; c < width; ++c) x[c] = (W(in[c]) - mean) * factor;
          if (keep == BYTE) {
            scales[2 * row] = low = least_of(x, width, W(1));
            scales[2 * row + 1] = step = std::max((-least_of(x, width, W(-1)) - low) / 255, W(1e-18));
          }
          const W per_step = 1 / step;
          INDEPENDENT
          for (int64_t c = 0; c < width; ++c) {
            put(write + c, fma_(x[c], p[c], q[c]));
            keep_value(code + c, x[c], low, per_step);
          }
        }
      });
    });
  });
  return {y, kept, scale, inverse};
}

// The gradients of the input, gamma and beta.
std::tuple<Tensor, Tensor, Tensor> row_backward(const Tensor& dy_, const Tensor& kept, const Tensor& scale,
                                                const Tensor& inverse, const Tensor& gamma) {
  const Tensor dy = dy_.contiguous(), g = gamma.contiguous();
  const int64_t width = dy.size(-1), rows = dy.numel() / width, chunks = (rows + CHUNK - 1) / CHUNK;
  Tensor dz = at::empty_like(dy), dgamma = at::empty_like(g), dbeta = at::empty_like(g);
  std::vector<double> partial(chunks * 2 * width);
  with_type(dy, [&](auto type) {
    using T = decltype(type);
    using W = wide<T>;
    with_rounded(kept.scalar_type() == at::kByte ? BYTE : BFLOAT16, [&](auto kind) {
      using K = decltype(kind);
      const T* from = data<T>(dy);
      const K* codes = data<K>(kept);
      const W *p = data<W>(g), *inverses = data<W>(inverse), *scales = data<W>(scale);
      T* out = dz.data_ptr<T>();
      over_rows(rows, [&](int64_t index, int64_t first, int64_t last) {
        std::vector<W> room(4 * width);
        W *__restrict x = room.data(), *__restrict d = x + width;
        W *__restrict sum = d + width, *__restrict product = sum + width;
        double* total = &partial[index * 2 * width];
        for (int64_t row = first; row < last; ++row) {
          const T* __restrict grad = from + row * width;
          const K* __restrict code = codes + row * width;
          T* __restrict write = out + row * width;
          const W low = scale.numel() ? scales[2 * row] : W(0), step = scale.numel() ? scales[2 * row + 1] : W(1);
          INDEPENDENT
          for (int64_t c = 0; c < width; ++c) {
            x[c] = fma_(W(code[c]), step, low);
            d[c] = W(grad[c]) * p[c];
            sum[c] += W(grad[c]);
            product[c] += W(grad[c]) * x[c];
          }
          const W mean = sum_of<W>(width, [&](int64_t c) { return d[c]; }) / width;
          const W slope = sum_of<W>(width, [&](int64_t c) { return d[c] * x[c]; }) / width;
          INDEPENDENT
          for (int64_t c = 0; c < width; ++c) put(write + c, inverses[row] * (d[c] - mean - x[c] * slope));
        }
        for (int64_t c = 0; c < width; ++c) total[c] = sum[c], total[width + c] = product[c];
      });
      W *to_gamma = dgamma.data_ptr<W>(), *to_beta = dbeta.data_ptr<W>();
      for (int64_t c = 0; c < width; ++c) {
        double sum = 0, product = 0;
        for (int64_t i = 0; i < chunks; ++i) {
          sum += partial[2 * i * width + c];
          product += partial[(2 * i + 1) * width + c];
        }
        to_beta[c] = sum;
        to_gamma[c] = product;
      }
    });
  });
  return {dz, dgamma, dbeta};
}

}  // namespace

TORCH_LIBRARY(bnaa, m) {
  m.def("stats(Tensor z, bool range) -> Tensor");
  m.def("forward(Tensor z, Tensor? residual, Tensor slope, Tensor level, Tensor zero, Tensor step, int act, int keep, "
        "bool with_mask) -> (Tensor, Tensor, Tensor)");
  m.def("sums(Tensor dy, Tensor kept, Tensor? mask, Tensor slope, Tensor level, Tensor zero, int act, bool want_du, "
        "Tensor? more=None) -> (Tensor, Tensor)");
  m.def("input_gradient(Tensor dy, Tensor kept, Tensor? mask, Tensor slope, Tensor level, Tensor zero, int act, "
        "Tensor by, Tensor along, Tensor constant) -> Tensor");
  m.def("restore(Tensor kept, Tensor slope, Tensor level, int act) -> Tensor");
  m.def("row_forward(Tensor z, Tensor gamma, Tensor beta, float eps, int keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("row_backward(Tensor dy, Tensor kept, Tensor scale, Tensor inverse, Tensor gamma) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(bnaa, CPU, m) {
  m.impl("stats", stats);
  m.impl("forward", forward);
  m.impl("sums", sums);
  m.impl("input_gradient", input_gradient);
  m.impl("restore", restore);
  m.impl("row_forward", row_forward);
  m.impl("row_backward", row_backward);
}
