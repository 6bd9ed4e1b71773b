// Vectors of float and double as wide as the instruction set, by the vector extensions of g++ and clang: arithmetic on
// them is plain C++, and the compiler fuses multiply-adds where the processor has them. Everything is in an unnamed
// namespace: this file is compiled once per instruction set, and no copy may be shared between them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

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

template <class T>
inline Vec<T> square_root(Vec<T> x) {
  for (int lane = 0; lane < width<T>; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

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

// a0 b0 a1 b1 ... of the lower or the upper halves.
template <class T, int... I>
inline Vec<T> interleave_low(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * width<T>)...);
}
template <class T, int... I>
inline Vec<T> interleave_high(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (width<T> / 2 + I / 2 + (I % 2) * width<T>)...);
}
template <class T>
inline Vec<T> low(Vec<T> a, Vec<T> b) {
  return interleave_low<T>(a, b, std::make_integer_sequence<int, width<T>>());
}
template <class T>
inline Vec<T> high(Vec<T> a, Vec<T> b) {
  return interleave_high<T>(a, b, std::make_integer_sequence<int, width<T>>());
}

// Transposes a square of width x width numbers: each round is a perfect shuffle, log2(width) of them transpose.
template <class T>
inline void transpose_square(Vec<T> (&v)[width<T>]) {
  constexpr int n = width<T>;
  for (int round = 1; round < n; round *= 2) {
    Vec<T> t[n];
    for (int j = 0; j < n / 2; ++j) {
      t[2 * j] = low<T>(v[j], v[j + n / 2]);
      t[2 * j + 1] = high<T>(v[j], v[j + n / 2]);
    }
    for (int j = 0; j < n; ++j) v[j] = t[j];
  }
}

// The sums over the lanes of `width` vectors, as one vector: the same shuffles, adding what they bring together.
template <class T>
inline Vec<T> sum_lanes(Vec<T> (&v)[width<T>]) {
  for (int half = width<T> / 2; half >= 1; half /= 2)
    for (int j = 0; j < half; ++j) v[j] = low<T>(v[j], v[j + half]) + high<T>(v[j], v[j + half]);
  return v[0];
}

template <class T>
inline T sum_lanes(Vec<T> v) {
  T total = 0;
  for (int lane = 0; lane < width<T>; ++lane) total += v[lane];
  return total;
}

}  // namespace
}  // namespace mann_fast
