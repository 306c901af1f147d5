// The inner loops for x86-64 with AVX-512 and its integer products (VNNI).
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
// GCC's own header leaves operands undefined on purpose, and warns of it where it is inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace hire {
namespace avx512 {

constexpr int64_t kLanes = 16;
constexpr int kRegisters = 32;
using F = __m512;

inline F Zero() { return _mm512_setzero_ps(); }
inline F Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, F f) { _mm512_storeu_ps(p, f); }
inline F LoadBF16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F LoadF16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F LoadE5M2(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(wide, 8));
}
// As f16, whose exponents are larger by 8; the conversion keeps denormals in every mode of the processor.
inline F LoadE4M3(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), sign = _mm256_xor_si256(wide, size);
  const __m256i half = _mm256_or_si256(_mm256_slli_epi16(sign, 8), _mm256_slli_epi16(size, 7));
  // 0x7f is NaN.
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7e00));
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(half, nan)), _mm512_set1_ps(256.0f));
}
inline F LoadS8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Nibbles side by side; flipping the sign's bit and taking it off again extends it.
inline F LoadS4(const uint8_t* p) {
  const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(0xf);
  const __m128i each = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
  const __m128i sign = _mm_set1_epi8(8);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(_mm_xor_si128(each, sign), sign)));
}
inline F Broadcast(float x) { return _mm512_set1_ps(x); }
inline F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F Add(F a, F b) { return _mm512_add_ps(a, b); }
inline F Abs(F a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
inline F Max(F a, F b) { return _mm512_max_ps(a, b); }
inline F NaNs(F a, F b) { return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), b); }
inline bool NotBelow(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ) != 0; }
inline int64_t Places(F a, F b, int32_t first, int32_t* out) {
  const __mmask16 mask = _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Packed in a register: some processors take a hundred cycles to pack into memory.
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(_mm512_set1_epi32(first), lanes)));
  return __builtin_popcount(mask);
}
inline float Sum(F a) { return _mm512_reduce_add_ps(a); }

constexpr int64_t kBytes = 64;
// The product is of bytes without a sign with bytes that have one: 128 is added to each entry of a row.
constexpr int32_t kOffset8 = 128;
using Bytes = __m512i;
using I = __m512i;
inline I ZeroI() { return _mm512_setzero_si512(); }
inline Bytes LoadBytes(const void* p) { return _mm512_loadu_si512(p); }
inline I DotS8(I sum, Bytes row, Bytes token) { return _mm512_dpbusd_epi32(sum, row, token); }
inline I DotU8(I sum, Bytes row, Bytes token) { return _mm512_dpbusd_epi32(sum, row, token); }
inline int32_t SumI(I sum) { return _mm512_reduce_add_epi32(sum); }
// Neighbours are added up within each quarter, so that its four lanes are of the four sums; then the quarters.
inline void SumFour(const I (&sums)[4], int32_t* out) {
  const I ab = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
  const I cd = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
  const I all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  __m128i* to = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), four));
}
inline Bytes Biased(Bytes row) { return _mm512_xor_si512(row, _mm512_set1_epi8(static_cast<char>(0x80))); }
inline Bytes Low(Bytes row) {
  return _mm512_xor_si512(_mm512_and_si512(row, _mm512_set1_epi8(0xf)), _mm512_set1_epi8(8));
}
inline Bytes High(Bytes row) { return Low(_mm512_srli_epi16(row, 4)); }

#include "kernels_body.h"

}  // namespace avx512

const Kernels kAvx512 = {"AVX-512 VNNI", avx512::ScoresAll, avx512::DotsAll, avx512::SumsAll, avx512::ArgMaxAll, avx512::NotBelowAll, avx512::QuantizeAll, avx512::SumOf};

}  // namespace hire

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
