// The inner loops, once for each instruction set; kernels_body.h has them, kernels_*.cc compile them.
#ifndef HIRE_KERNELS_H_
#define HIRE_KERNELS_H_

#include <cstdint>

namespace hire {

// A number as a type.
template <int N>
struct Width {
  static constexpr int value = N;
};

// Tokens, or limbs of tokens, that one call takes.
constexpr int64_t kMostTokens = 64;

// kE4M3 is float8_e4m3fn, which has no infinity, and kE5M2 float8_e5m2. kS4 is two entries a byte, the first one low.
enum class RowType { kF32, kBF16, kF16, kE4M3, kE5M2, kS8, kS4 };

// Bytes of so many entries, an even number of those of four bits.
constexpr int64_t BytesOf(RowType type, int64_t entries) {
  if (type == RowType::kS4) return entries / 2;
  return entries * (type == RowType::kF32 ? 4 : type == RowType::kBF16 || type == RowType::kF16 ? 2 : 1);
}

// Integer products of quantised rows with quantised tokens.
struct Scores {
  const uint8_t* rows;    // [n, row_bytes]: int8, or two 4-bit entries a byte, the row's first half in the low nibbles
  const uint8_t* end;     // behind the last
  int64_t row_bytes;
  int bits;               // 8 or 4
  const int8_t* tokens;   // [limbs * T, 2 * kPadded(row_bytes) or once that]: zeros behind each (half) row
  int64_t token_stride;   // bytes from one to the next
  int64_t half_stride;    // of 4 bits: from the first half of a token to the second
  const int32_t* sums;    // [limbs * T]: the sum of each token's entries
  int count;              // limbs * T
  int limbs;              // 1, or 2: tokens T .. 2T - 1 are what the first T lost, in steps of 1/254
  const float* token_scale;  // [T]
  const float* row_scale;    // [n]
  float* out;                // [T, n]
  int64_t n;
};

// What rows of int8 and int4 are multiplied with: [n / rows, d / columns], each for so many rows and columns. Null: nothing.
// `columns` is 1, d, or a multiple of kScaled.
struct Scale {
  const float* values;
  int64_t rows;
  int64_t columns;
};
constexpr int64_t kScaled = 64;

// Products of chosen rows: out[t, i] = rows[index[i]] . x[t].
struct Dots {
  const uint8_t* rows;   // [n, d]
  RowType type;
  Scale scale;
  int64_t d;
  const int32_t* index;  // counts groups; null: all rows in order
  int64_t group;
  const float* x;        // [T, d]
  int64_t tokens;
  float* out;            // [T, stride]
  int64_t stride;
  bool magnitudes;       // of the rows' magnitudes; x holds its own already
};

// Sums of chosen rows: out[t] = sum over i of h[t, i] rows[index[i]].
struct Sums {
  const uint8_t* rows;   // [n, d]
  RowType type;
  Scale scale;
  int64_t d;
  const int32_t* index;  // counts groups
  int64_t group;
  const float* h;        // [T, stride]
  int64_t stride;
  int64_t tokens;
};

struct Kernels {
  const char* name;
  // Rows first .. last - 1.
  void (*scores)(const Scores&, int64_t first, int64_t last);
  // Entries first .. last - 1 of the index (rows of them: group times as many).
  void (*dots)(const Dots&, int64_t first, int64_t last);
  // Adds entries first .. last - 1 up in `total`, f32 [T, d], which it sets.
  void (*sums)(const Sums&, int64_t first, int64_t last, float* total);
  // Where the first NaN stands, or the first of the largest; n > 0.
  int64_t (*arg_max)(const float* values, int64_t n);
  // Writes where values stand that are not smaller than `least`, NaNs among them, in order, and anything behind that; how
  // many there are. `out` has room for n.
  int64_t (*not_below)(const float* values, int64_t n, float least, int32_t* out);
  // Writes n numbers in integers of 8 bits and returns their scale; with `second`, what that lost in 8 more, and in `kept`
  // what both keep.
  float (*quantize)(const float* x, int64_t n, int8_t* first, int8_t* second, float* kept);
  // The sum of n integers.
  int32_t (*sum)(const int8_t* q, int64_t n);
};

// Bytes read at once: token rows are zero up to a multiple of it.
constexpr int64_t kBlock = 64;
inline int64_t Padded(int64_t bytes) { return (bytes + kBlock - 1) / kBlock * kBlock; }

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

}  // namespace hire

#endif  // HIRE_KERNELS_H_
