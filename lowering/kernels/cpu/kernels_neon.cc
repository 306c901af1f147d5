// The inner loops for aarch64 with its integer products (dotprod, of Armv8.2), which all but its oldest processors have.
#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace hire {
namespace neon {

constexpr int64_t kLanes = 4;
constexpr int kRegisters = 32;
using F = float32x4_t;

inline F Zero() { return vdupq_n_f32(0.0f); }
inline F Load(const float* p) { return vld1q_f32(p); }
inline void Store(float* p, F f) { vst1q_f32(p, f); }
inline F LoadBF16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline F LoadF16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
// Four bytes in the low halves of 16 bits.
inline uint16x4_t Four(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  return vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))));
}
inline F LoadE5M2(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vshl_n_u16(Four(p), 8))); }
// As f16, whose exponents are larger by 8.
inline F LoadE4M3(const uint8_t* p) {
  const uint16x4_t wide = Four(p), size = vand_u16(wide, vdup_n_u16(0x7f)), sign = veor_u16(wide, size);
  // 0x7f is NaN.
  const uint16x4_t nan = vand_u16(vceq_u16(size, vdup_n_u16(0x7f)), vdup_n_u16(0x7e00));
  const uint16x4_t half = vorr_u16(vorr_u16(vshl_n_u16(sign, 8), vshl_n_u16(size, 7)), nan);
  return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(half)), 256.0f);
}
inline F LoadS8(const int8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  const int16x4_t wide = vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))));
  return vcvtq_f32_s32(vmovl_s16(wide));
}
// Each byte twice: shifted up, its low nibble and, as it is, its high one; then either is shifted down with its sign.
inline F LoadS4(const uint8_t* p) {
  const int32_t first = static_cast<int8_t>(p[0]), second = static_cast<int8_t>(p[1]);
  const int32x4_t both = vcombine_s32(vdup_n_s32(first), vdup_n_s32(second));
  const int32_t up[4] = {28, 24, 28, 24};
  return vcvtq_f32_s32(vshrq_n_s32(vshlq_s32(both, vld1q_s32(up)), 28));
}
inline F Broadcast(float x) { return vdupq_n_f32(x); }
inline F Fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F Add(F a, F b) { return vaddq_f32(a, b); }
inline F Abs(F a) { return vabsq_f32(a); }
inline F Max(F a, F b) { return vmaxq_f32(a, b); }
inline F NaNs(F a, F b) { return vbslq_f32(vceqq_f32(b, b), a, b); }
inline bool NotBelow(F a, F b) { return vminvq_u32(vcltq_f32(a, b)) == 0; }
inline int64_t Places(F a, F b, int32_t first, int32_t* out) {
  uint32_t below[kLanes];
  vst1q_u32(below, vcltq_f32(a, b));
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i)
    if (!below[i]) out[count++] = first + i;
  return count;
}
inline float Sum(F a) { return vaddvq_f32(a); }

constexpr int64_t kBytes = 16;
constexpr int32_t kOffset8 = 0;
using Bytes = int8x16_t;
using I = int32x4_t;
inline I ZeroI() { return vdupq_n_s32(0); }
inline Bytes LoadBytes(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
inline I DotS8(I sum, Bytes row, Bytes token) { return vdotq_s32(sum, row, token); }
inline I DotU8(I sum, Bytes row, Bytes token) { return vdotq_s32(sum, row, token); }
inline int32_t SumI(I sum) { return vaddvq_s32(sum); }
inline void SumFour(const I (&sums)[4], int32_t* out) {
  const I four = vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
  vst1q_s32(out, vaddq_s32(vld1q_s32(out), four));
}
inline Bytes Biased(Bytes row) { return row; }
inline Bytes Low(Bytes row) { return veorq_s8(vandq_s8(row, vdupq_n_s8(0xf)), vdupq_n_s8(8)); }
inline Bytes High(Bytes row) { return Low(vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(row), 4))); }

#include "kernels_body.h"

}  // namespace neon

const Kernels kNeon = {"NEON with dot products", neon::ScoresAll, neon::DotsAll,    neon::SumsAll,
                       neon::ArgMaxAll,          neon::NotBelowAll, neon::QuantizeAll, neon::SumOf};

}  // namespace hire

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __aarch64__
