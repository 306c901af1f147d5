// The inner loops in plain C++: what every processor runs, and the compiler makes vectors of where it can.
#include <cstring>

#include "kernels.h"

namespace hire {
namespace portable {

constexpr int64_t kLanes = 8;
constexpr int kRegisters = 8;
struct F {
  float v[kLanes];
};

inline F Zero() { return F{}; }
inline F Load(const float* p) {
  F f;
  for (int i = 0; i < kLanes; ++i) f.v[i] = p[i];
  return f;
}
inline void Store(float* p, F f) {
  for (int i = 0; i < kLanes; ++i) p[i] = f.v[i];
}
inline F LoadBF16(const uint16_t* p) {
  F f;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(&f.v[i], &bits, 4);
  }
  return f;
}
inline float FromF16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = static_cast<uint32_t>(half & 0x7fff) << 13;
  uint32_t bits;
  if (half & 0x7c00) {
    // Exponents of f16 begin 112 below those of f32; infinities and NaNs have the largest of either.
    bits = (half & 0x7c00) == 0x7c00 ? rest | 0x70000000 : rest + (112u << 23);
  } else {
    // Made of the integer: the processor may take f32 as small as the bits for zero.
    const float value = static_cast<float>(half & 0x3ff) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline F LoadF16(const uint16_t* p) {
  F f;
  for (int i = 0; i < kLanes; ++i) f.v[i] = FromF16(p[i]);
  return f;
}
inline F LoadE5M2(const uint8_t* p) {
  F f;
  for (int i = 0; i < kLanes; ++i) f.v[i] = FromF16(static_cast<uint16_t>(p[i] << 8));
  return f;
}
// As f16, whose exponents are larger by 8; 0x7f is NaN.
inline F LoadE4M3(const uint8_t* p) {
  F f;
  for (int i = 0; i < kLanes; ++i) {
    const int size = p[i] & 0x7f, half = (p[i] & 0x80) << 8 | (size == 0x7f ? 0x7e00 : size << 7);
    f.v[i] = FromF16(static_cast<uint16_t>(half)) * 256.0f;
  }
  return f;
}
inline F LoadS8(const int8_t* p) {
  F f;
  for (int i = 0; i < kLanes; ++i) f.v[i] = p[i];
  return f;
}
inline F LoadS4(const uint8_t* p) {
  F f;
  for (int i = 0; i < kLanes; ++i) f.v[i] = static_cast<float>(((p[i / 2] >> (i % 2 * 4) & 0xf) ^ 8) - 8);
  return f;
}
inline F Broadcast(float x) {
  F f;
  for (int i = 0; i < kLanes; ++i) f.v[i] = x;
  return f;
}
inline F Fma(F a, F b, F c) {
  for (int i = 0; i < kLanes; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline F Add(F a, F b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
inline F Abs(F a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = __builtin_fabsf(a.v[i]);
  return a;
}
inline F Max(F a, F b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = b.v[i] > a.v[i] ? b.v[i] : a.v[i];
  return a;
}
inline F NaNs(F a, F b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = b.v[i] != b.v[i] ? b.v[i] : a.v[i];
  return a;
}
inline bool NotBelow(F a, F b) {
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= !(a.v[i] < b.v[i]);
  return any;
}
inline int64_t Places(F a, F b, int32_t first, int32_t* out) {
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i)
    if (!(a.v[i] < b.v[i])) out[count++] = first + i;
  return count;
}
inline float Sum(F a) {
  for (int k = kLanes / 2; k > 0; k /= 2)
    for (int i = 0; i < k; ++i) a.v[i] += a.v[i + k];
  return a.v[0];
}

constexpr int64_t kBytes = 16;
constexpr int32_t kOffset8 = 0;
struct Bytes {
  int8_t v[kBytes];
};
struct I {
  int32_t v[4];
};
inline I ZeroI() { return I{}; }
inline Bytes LoadBytes(const void* p) {
  Bytes b;
  std::memcpy(b.v, p, kBytes);
  return b;
}
inline I DotS8(I sum, Bytes row, Bytes token) {
  for (int i = 0; i < kBytes; ++i) sum.v[i % 4] += static_cast<int32_t>(row.v[i]) * token.v[i];
  return sum;
}
inline I DotU8(I sum, Bytes row, Bytes token) { return DotS8(sum, row, token); }
inline int32_t SumI(I sum) { return sum.v[0] + sum.v[1] + sum.v[2] + sum.v[3]; }
inline void SumFour(const I (&sums)[4], int32_t* out) {
  for (int r = 0; r < 4; ++r) out[r] += SumI(sums[r]);
}
inline Bytes Biased(Bytes row) { return row; }
inline Bytes Low(Bytes row) {
  for (int i = 0; i < kBytes; ++i) row.v[i] = (row.v[i] & 0xf) ^ 8;
  return row;
}
inline Bytes High(Bytes row) {
  for (int i = 0; i < kBytes; ++i) row.v[i] = ((row.v[i] >> 4) & 0xf) ^ 8;
  return row;
}

#include "kernels_body.h"

}  // namespace portable

const Kernels kPortable = {"portable", portable::ScoresAll, portable::DotsAll, portable::SumsAll, portable::ArgMaxAll, portable::NotBelowAll, portable::QuantizeAll, portable::SumOf};

}  // namespace hire
