// Vectors as wide as the processor's, and how elements in half precision are read into them: for the
// kernels, which are compiled together with this file.
//
// The compiler's own vector types: it makes instructions of the processor of them, or, where that
// has none, plain arithmetic. Types that are wider than the processor's vectors would be correct as
// well, and ten times as slow.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if !defined(TMM_VECTOR_BYTES)  // as it is, but for tests and benchmarks
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define TMM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TMM_VECTOR_BYTES 32
#elif defined(__SSE2__) || defined(__ARM_NEON) || defined(__VSX__) || defined(__VEC__)
#define TMM_VECTOR_BYTES 16
#else
#define TMM_VECTOR_BYTES 8
#endif
#endif

#if TMM_VECTOR_BYTES == 64
#define TMM_INSTRUCTION_SET "AVX-512"
#elif TMM_VECTOR_BYTES == 32
#define TMM_INSTRUCTION_SET "AVX2"
#elif TMM_VECTOR_BYTES == 16 && defined(__ARM_NEON)
#define TMM_INSTRUCTION_SET "NEON"
#elif TMM_VECTOR_BYTES == 16
#define TMM_INSTRUCTION_SET "vectors of 16 bytes"
#else
#define TMM_INSTRUCTION_SET "no vectors"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Inductor compiles without fused multiply-add, which is slower and less accurate.
#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

namespace {

constexpr int BYTES = TMM_VECTOR_BYTES;

template <class Scalar, int SIZE = BYTES>
struct Lanes {
  typedef Scalar type __attribute__((vector_size(SIZE)));
};
template <class Scalar>
using Vector = typename Lanes<Scalar>::type;
template <class Scalar>
constexpr int WIDTH = BYTES / sizeof(Scalar);

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// As many elements of two bytes as there are floats in a vector, in 32 bits each.
Vector<uint32_t> load_bits(const void* from) {
  typename Lanes<uint16_t, BYTES / 2>::type bits;
  std::memcpy(&bits, from, sizeof(bits));
// GCC makes several instructions of a conversion of vectors where the processor has one.
#if TMM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Vector<uint32_t>)_mm512_cvtepu16_epi32((__m256i)bits);
#elif TMM_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (Vector<uint32_t>)_mm256_cvtepu16_epi32((__m128i)bits);
#elif TMM_VECTOR_BYTES == 16 && defined(__SSE4_1__)
  return (Vector<uint32_t>)_mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
#elif TMM_VECTOR_BYTES == 16 && defined(__aarch64__)
  return (Vector<uint32_t>)vmovl_u16((uint16x4_t)bits);
#else
  return __builtin_convertvector(bits, Vector<uint32_t>);
#endif
}

Vector<float> as_float(Vector<uint32_t> bits) {
  Vector<float> values;
  std::memcpy(&values, &bits, sizeof(values));
  return values;
}

// By arithmetic on bits, for processors that do not convert.
Vector<float> float_of_half(Vector<uint32_t> half) {
  const Vector<uint32_t> magnitude = half & 0x7fff;
  // The exponent's bias grows by 112; that of infinity and NaN is all ones in both.
  Vector<uint32_t> bits = (magnitude << 13) + (112u << 23);
  bits += (Vector<uint32_t>)(magnitude >= 0x7c00) & (112u << 23);
  const Vector<float> subnormal =
      __builtin_convertvector(magnitude, Vector<float>) * (1.0f / (1 << 24));
  Vector<uint32_t> small;
  std::memcpy(&small, &subnormal, sizeof(small));
  const Vector<uint32_t> is_small = (Vector<uint32_t>)(magnitude < 0x400);
  bits = (small & is_small) | (bits & ~is_small);
  return as_float(bits | ((half & 0x8000) << 16));
}

// A vector of elements in the arithmetic that they are reduced in.
Vector<double> load(const double* from) {
  Vector<double> values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

Vector<float> load(const float* from) {
  Vector<float> values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

Vector<float> load(const BFloat16* from) { return as_float(load_bits(from) << 16); }

Vector<float> load(const Float16* from) {
#if TMM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif TMM_VECTOR_BYTES == 32 && defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif TMM_VECTOR_BYTES == 16 && defined(__F16C__)
  return (Vector<float>)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif TMM_VECTOR_BYTES == 16 && defined(__aarch64__)
  return (Vector<float>)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
#else
  return float_of_half(load_bits(from));
#endif
}

}  // namespace

extern "C" const char* instruction_set() { return TMM_INSTRUCTION_SET; }
