// bfloat16 and float16 as 16-bit patterns, to and from float; round to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MANN_FAST_ANYWHERE __host__ __device__
#else
#define MANN_FAST_ANYWHERE
#endif

namespace mann_fast {
namespace {

MANN_FAST_ANYWHERE inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MANN_FAST_ANYWHERE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MANN_FAST_ANYWHERE inline float from_bfloat16(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

MANN_FAST_ANYWHERE inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

MANN_FAST_ANYWHERE inline float from_float16(uint16_t half) {
  // The exponent's offset is made good by a product, which also normalises float16's denormal numbers.
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t finite = float_to_bits(scaled);
  const uint32_t infinite_or_nan = magnitude | 0x7f800000u;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  return bits_to_float(((half & 0x7c00u) == 0x7c00u ? infinite_or_nan : finite) | sign);
}

MANN_FAST_ANYWHERE inline uint16_t to_float16(float value) {
  const uint32_t sign = float_to_bits(value) & 0x80000000u;
  const uint32_t magnitude = float_to_bits(value) ^ sign;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or beyond
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a sum with 0.5 leaves the rounded denormal in the low bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | (sign >> 16));
}

}  // namespace
}  // namespace mann_fast
