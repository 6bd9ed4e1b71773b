// Vectors of float and double as wide as the instruction set, by the vector extensions of g++ and clang: arithmetic on
// them is plain C++, and the compiler fuses multiply-adds where the processor has them. Everything is in an unnamed
// namespace: this file is compiled once per instruction set, and no copy may be shared between them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MANN_FAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MANN_FAST_VECTOR_BYTES 32
#else
#define MANN_FAST_VECTOR_BYTES 16
#endif

namespace mann_fast {
namespace {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(MANN_FAST_VECTOR_BYTES)));
  typedef int32_t IntVec __attribute__((vector_size(MANN_FAST_VECTOR_BYTES)));
  typedef int32_t Int;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(MANN_FAST_VECTOR_BYTES)));
  typedef int64_t IntVec __attribute__((vector_size(MANN_FAST_VECTOR_BYTES)));
  typedef int64_t Int;
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using IntVec = typename Simd<T>::IntVec;
template <class T>
using Int = typename Simd<T>::Int;
template <class T>
constexpr int width = MANN_FAST_VECTOR_BYTES / sizeof(T);

// A count rounded up to whole vectors.
template <class T>
constexpr int64_t padded(int64_t count) {
  return (count + width<T> - 1) / width<T> * width<T>;
}

// An instruction set's registers bound how many accumulators a loop may keep.
constexpr int vector_registers = MANN_FAST_VECTOR_BYTES == 64 ? 32 : 16;

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}
// The same past the caches: a cache line that is written as a whole, at once, need not be fetched first. `to` is a multiple of
// a vector; `finish_streams` orders what was written before what comes after.
template <class T>
inline void stream(T* to, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)v);
#else
  store(to, v);
#endif
}
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
inline IntVec<float> load_int(const int32_t* from) {
  IntVec<float> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline IntVec<double> load_int(const int64_t* from) {
  IntVec<double> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T>
inline IntVec<T> splat_int(Int<T> x) {
  return x - IntVec<T>{};
}

// 1 / sqrt(x). In float by the processor's estimate and one Newton step, within 2e-7 (AVX2) or 1e-7 (AVX-512), at a third of
// the time of root and division. The estimate of a denormal number may be infinite, so x counts as the least normal one; of
// infinity it is 0, with which the step would make NaN.
template <class T>
inline Vec<T> inverse_root(Vec<T> x) {
  for (int lane = 0; lane < width<T>; ++lane) x[lane] = T(1) / std::sqrt(x[lane]);
  return x;
}
#if defined(__AVX2__)
template <>
inline Vec<float> inverse_root<float>(Vec<float> x) {
  x = x < std::numeric_limits<float>::min() ? splat(std::numeric_limits<float>::min()) : x;
#if defined(__AVX512F__)
  const Vec<float> y = _mm512_maskz_rsqrt14_ps(0xffff, x);
#else
  const Vec<float> y = _mm256_rsqrt_ps(x);
#endif
  return x > std::numeric_limits<float>::max() ? y : y * (1.5f - (0.5f * x) * (y * y));
}
#endif

inline Vec<float> as_float(IntVec<float> x) {
  Vec<float> v;
  std::memcpy(&v, &x, sizeof v);
  return v;
}
inline Vec<double> as_float(IntVec<double> x) {
  Vec<double> v;
  std::memcpy(&v, &x, sizeof v);
  return v;
}
inline IntVec<float> as_int(Vec<float> x) {
  IntVec<float> v;
  std::memcpy(&v, &x, sizeof v);
  return v;
}
inline IntVec<double> as_int(Vec<double> x) {
  IntVec<double> v;
  std::memcpy(&v, &x, sizeof v);
  return v;
}

// exp(x) for x <= 0 or NaN, as a softmax needs it; results below the smallest normal number are 0. Cody-Waite reduction
// by two parts of ln 2, a polynomial on [-ln 2 / 2, ln 2 / 2] (float: the coefficients of Cephes' expf; double: Taylor),
// and the exponent added in integers. Relative error below 1e-7 (float), 1e-15 (double).
inline Vec<float> exp_nonpositive(Vec<float> x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float> shifted = x * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec<float> exponent = (as_int(shifted) - (0x4b400000 - 127)) << 23;
  const Vec<float> result = p * as_float(exponent);
  return x < -87.0f ? Vec<float>{} : result;
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> shifted = x * 1.4426950408889634 + magic;
  const Vec<double> n = shifted - magic;
  const Vec<double> r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  Vec<double> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const IntVec<double> exponent = (as_int(shifted) - (0x4338000000000000 - 1023)) << 52;
  const Vec<double> result = p * as_float(exponent);
  return x < -708.0 ? Vec<double>{} : result;
}

// log(x) for x > 0, from the least normal number on. Float: exponent and mantissa apart, the polynomial of Cephes' logf on
// [sqrt(1/2), sqrt(2)), relative error below 1e-7.
inline Vec<float> log_positive(Vec<float> x) {
  const IntVec<float> bits = as_int(x) - 0x3f3504f3;  // of sqrt(1/2): what is left of the exponent counts from there
  const IntVec<float> exponent = bits >> 23;
  const Vec<float> z = as_float((bits & 0x007fffff) + 0x3f3504f3) - 1.0f, e = __builtin_convertvector(exponent, Vec<float>);
  Vec<float> p = z * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * z + 1.1676998740e-1f;
  p = p * z - 1.2420140846e-1f;
  p = p * z + 1.4249322787e-1f;
  p = p * z - 1.6668057665e-1f;
  p = p * z + 2.0000714765e-1f;
  p = p * z - 2.4999993993e-1f;
  p = p * z + 3.3333331174e-1f;
  const Vec<float> tail = p * z * (z * z) - e * 2.12194440e-4f - z * z * 0.5f;
  return (z + tail) + e * 0.693359375f;
}
inline Vec<double> log_positive(Vec<double> x) {
  for (int lane = 0; lane < width<double>; ++lane) x[lane] = std::log(x[lane]);
  return x;
}

// For x from 0 to 1 its logarithm, of 0 that of the least normal number.
template <class T>
inline Vec<T> log_of_share(Vec<T> x) {
  const T least = std::numeric_limits<T>::min();
  return log_positive(x > least ? x : splat<T>(least));
}

// x to a power of at least 0, infinite too, for x from 0 to 1; 0 to the power 0 and 1 to any are 1. A negative or NaN x gives
// NaN. The logarithm is log_of_share of x.
template <class T>
inline Vec<T> power(Vec<T> x, Vec<T> logarithm, T exponent) {
  if (exponent == T(0)) return splat<T>(1);
  const Vec<T> result = exp_nonpositive(logarithm * exponent);
  const Vec<T> none = splat<T>(std::numeric_limits<T>::quiet_NaN());
  return x == T(1) ? splat<T>(1) : x > T(0) ? result : x == T(0) ? Vec<T>{} : none;
}

template <class T>
inline Vec<T> absolute(Vec<T> x) {
  return as_float(as_int(x) & splat_int<T>(std::numeric_limits<Int<T>>::max()));
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_nonpositive(-absolute<T>(x));
  return (x < T(0) ? e : splat<T>(1)) / (e + T(1));
}

// tanh: near 0 by the approximations of Cephes (tanhf.c, tanh.c), so that small results keep their relative precision.
inline Vec<float> tanh_near_zero(Vec<float> x, Vec<float> z) {
  Vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return p * z * x + x;
}
inline Vec<double> tanh_near_zero(Vec<double> x, Vec<double> z) {
  const Vec<double> p = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const Vec<double> q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  return p / q * z * x + x;
}
template <class T>
inline Vec<T> hyperbolic_tangent(Vec<T> x) {
  const Vec<T> magnitude = absolute<T>(x), e = exp_nonpositive(magnitude * T(-2));
  const Vec<T> far = (T(1) - e) / (T(1) + e);
  return magnitude < T(0.625) ? tanh_near_zero(x, x * x) : x < T(0) ? -far : far;
}

// A vector of so many lanes, for the shuffles below.
template <class T, int LANES>
struct Lanes {
  typedef T Vec __attribute__((vector_size(LANES * sizeof(T))));
};

// a0 b0 a1 b1 ... of the lower or the upper halves.
template <int LANES, class V, int... I>
inline V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * LANES)...);
}
template <int LANES, class V, int... I>
inline V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (LANES / 2 + I / 2 + (I % 2) * LANES)...);
}
template <int LANES, class V>
inline V low(V a, V b) {
  return interleave_low<LANES>(a, b, std::make_integer_sequence<int, LANES>());
}
template <int LANES, class V>
inline V high(V a, V b) {
  return interleave_high<LANES>(a, b, std::make_integer_sequence<int, LANES>());
}

// Transposes a square of LANES x LANES numbers: each round is a perfect shuffle, log2(LANES) of them transpose.
template <class T, int LANES>
inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  using V = typename Lanes<T, LANES>::Vec;
  V v[LANES];
  for (int j = 0; j < LANES; ++j) std::memcpy(&v[j], from + j * from_stride, sizeof(V));
  for (int round = 1; round < LANES; round *= 2) {
    V t[LANES];
    for (int j = 0; j < LANES / 2; ++j) {
      t[2 * j] = low<LANES>(v[j], v[j + LANES / 2]);
      t[2 * j + 1] = high<LANES>(v[j], v[j + LANES / 2]);
    }
    for (int j = 0; j < LANES; ++j) v[j] = t[j];
  }
  for (int j = 0; j < LANES; ++j) std::memcpy(to + j * to_stride, &v[j], sizeof(V));
}

// The sums over the lanes of `width` vectors, as one vector: the same shuffles, adding what they bring together. A tree whose
// branches are vectors STEP apart, one after the other, so that few of them need a register at once.
template <class T, int STEP>
inline Vec<T> sum_branch(const Vec<T>* v) {
  if constexpr (STEP == width<T>) {
    return *v;
  } else {
    const Vec<T> a = sum_branch<T, 2 * STEP>(v), b = sum_branch<T, 2 * STEP>(v + STEP);
    return low<width<T>>(a, b) + high<width<T>>(a, b);
  }
}
template <class T>
inline Vec<T> sum_lanes(const Vec<T> (&v)[width<T>]) {
  return sum_branch<T, 1>(v);
}

// Lane i + step in the place of lane i, cyclically.
template <int STEP, class V, int... I>
inline V rotate_lanes(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + STEP) % static_cast<int>(sizeof...(I)))...);
}

// One number from all lanes, by a tree.
template <int LANES, class V, class Combine>
inline auto reduce_lanes(V v, Combine combine) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  if constexpr (LANES >= 16) v = combine(v, rotate_lanes<8>(v, lanes));
  if constexpr (LANES >= 8) v = combine(v, rotate_lanes<4>(v, lanes));
  if constexpr (LANES >= 4) v = combine(v, rotate_lanes<2>(v, lanes));
  v = combine(v, rotate_lanes<1>(v, lanes));
  return v[0];
}

template <class T>
inline T sum_lanes(Vec<T> v) {
  return reduce_lanes<width<T>>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}
template <class T>
inline T maximum_lane(Vec<T> v) {  // a NaN loses
  return reduce_lanes<width<T>>(v, [](Vec<T> a, Vec<T> b) { return b > a ? b : a; });
}
template <class T>
inline Int<T> least_lane(IntVec<T> v) {
  return reduce_lanes<width<T>>(v, [](IntVec<T> a, IntVec<T> b) { return b < a ? b : a; });
}

// The first `count` numbers of a vector, or all of it where there are more; the others are 0. With AVX-512 under a mask, as a load
// of what was just copied together in smaller pieces waits for their stores.
#if defined(__AVX512F__)
template <class T>
inline uint32_t first_lanes(int64_t count) {
  return count >= width<T> ? ~0u : (1u << count) - 1;
}
inline Vec<float> load_some(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes<float>(count)), from);
}
inline Vec<double> load_some(const double* from, int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes<double>(count)), from);
}
inline void store_some(float* to, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(first_lanes<float>(count)), v);
}
inline void store_some(double* to, Vec<double> v, int64_t count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first_lanes<double>(count)), v);
}
#else
template <class T>
inline Vec<T> load_some(const T* from, int64_t count) {
  if (count >= width<T>) return load(from);
  Vec<T> v{};
  std::memcpy(&v, from, count * sizeof(T));
  return v;
}
template <class T>
inline void store_some(T* to, Vec<T> v, int64_t count) {
  std::memcpy(to, &v, count >= width<T> ? sizeof v : count * sizeof(T));
}
#endif

}  // namespace
}  // namespace mann_fast
