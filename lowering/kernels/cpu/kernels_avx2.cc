// The inner loops for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace hire {
namespace avx2 {

constexpr int64_t kLanes = 8;
constexpr int kRegisters = 16;
using F = __m256;

inline F Zero() { return _mm256_setzero_ps(); }
inline F Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, F f) { _mm256_storeu_ps(p, f); }
inline F LoadBF16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F LoadF16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F LoadE5M2(const uint8_t* p) {
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_slli_epi16(wide, 8));
}
// As f16, whose exponents are larger by 8; the conversion keeps denormals in every mode of the processor.
inline F LoadE4M3(const uint8_t* p) {
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i size = _mm_and_si128(wide, _mm_set1_epi16(0x7f)), sign = _mm_xor_si128(wide, size);
  const __m128i half = _mm_or_si128(_mm_slli_epi16(sign, 8), _mm_slli_epi16(size, 7));
  // 0x7f is NaN.
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, nan)), _mm256_set1_ps(256.0f));
}
inline F LoadS8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// Nibbles side by side; flipping the sign's bit and taking it off again extends it.
inline F LoadS4(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const __m128i pairs = _mm_cvtsi32_si128(four), low = _mm_set1_epi8(0xf), sign = _mm_set1_epi8(8);
  const __m128i each = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_sub_epi8(_mm_xor_si128(each, sign), sign)));
}
inline F Broadcast(float x) { return _mm256_set1_ps(x); }
inline F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F Add(F a, F b) { return _mm256_add_ps(a, b); }
inline F Abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F Max(F a, F b) { return _mm256_max_ps(a, b); }
inline F NaNs(F a, F b) { return _mm256_blendv_ps(a, b, _mm256_cmp_ps(b, b, _CMP_UNORD_Q)); }
inline bool NotBelow(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)) != 0; }
inline int64_t Places(F a, F b, int32_t first, int32_t* out) {
  int64_t count = 0;
  for (int mask = _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)); mask; mask &= mask - 1)
    out[count++] = first + __builtin_ctz(static_cast<unsigned>(mask));
  return count;
}
inline float Sum(F a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

constexpr int64_t kBytes = 32;
// Signs are moved from the row to the token, so nothing is added to a row.
constexpr int32_t kOffset8 = 0;
using Bytes = __m256i;
using I = __m256i;
inline I ZeroI() { return _mm256_setzero_si256(); }
inline Bytes LoadBytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
// Sums of two products in 16 bits: at most 2 * 128 * 127, which fits. Tokens are in [-127, 127].
inline I AddPairs(I sum, Bytes magnitudes, Bytes signed_bytes) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitudes, signed_bytes);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I DotS8(I sum, Bytes row, Bytes token) {
  return AddPairs(sum, _mm256_abs_epi8(row), _mm256_sign_epi8(token, row));
}
inline I DotU8(I sum, Bytes row, Bytes token) { return AddPairs(sum, row, token); }
inline int32_t SumI(I sum) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
inline void SumFour(const I (&sums)[4], int32_t* out) {
  const I all = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  __m128i* to = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), four));
}
inline Bytes Biased(Bytes row) { return row; }
inline Bytes Low(Bytes row) {
  return _mm256_xor_si256(_mm256_and_si256(row, _mm256_set1_epi8(0xf)), _mm256_set1_epi8(8));
}
inline Bytes High(Bytes row) { return Low(_mm256_srli_epi16(row, 4)); }

#include "kernels_body.h"

}  // namespace avx2

const Kernels kAvx2 = {"AVX2", avx2::ScoresAll, avx2::DotsAll, avx2::SumsAll, avx2::ArgMaxAll, avx2::NotBelowAll, avx2::QuantizeAll, avx2::SumOf};

}  // namespace hire

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
