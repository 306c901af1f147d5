// The steps that XLA calls, on plain arrays: what comes is checked before any of it is read, tokens are quantised, and
// blocks of rows are handed to threads. Each returns what is wrong with what it was given; an empty text if nothing is.
#ifndef HIRE_STEPS_H_
#define HIRE_STEPS_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "largest.h"
#include "parallel.h"

namespace hire {

// Bytes of rows that a thread takes at a time: many blocks for every thread, few enough that taking one costs nothing.
constexpr int64_t kBlockBytes = 128 * 1024;
// Parts that a sum over rows is made in, at most: their number hangs on shapes alone, so that results repeat.
constexpr int64_t kMostParts = 64;

// Values that a thread looks through at a time.
constexpr int64_t kValuesABlock = 32768;

enum class Element { kF32, kBF16, kF16, kE4M3, kE5M2, kS8, kS4, kU8, kS32, kOther };

// An array in row-major order.
struct Array {
  const void* data;
  Element element;
  std::vector<int64_t> dims;

  template <typename T>
  const T* As() const {
    return static_cast<const T*>(data);
  }
};

// Where a result goes: an array of so many numbers.
template <typename T>
struct Result {
  T* data;
  int64_t size;
};

inline std::string Shape(const Array& array) {
  std::string text = "[";
  for (int64_t size : array.dims) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline bool TypeOf(Element element, RowType* found) {
  switch (element) {
    case Element::kF32: *found = RowType::kF32; return true;
    case Element::kBF16: *found = RowType::kBF16; return true;
    case Element::kF16: *found = RowType::kF16; return true;
    case Element::kE4M3: *found = RowType::kE4M3; return true;
    case Element::kE5M2: *found = RowType::kE5M2; return true;
    case Element::kS8: *found = RowType::kS8; return true;
    case Element::kS4: *found = RowType::kS4; return true;
    default: return false;
  }
}

template <typename T>
std::string NotOfSize(const char* name, const Result<T>& out, int64_t size) {
  if (out.size == size) return "";
  return std::string(name) + " makes " + std::to_string(size) + " numbers, not " + std::to_string(out.size);
}

inline bool IsMatrix(const Array& array, Element element) { return array.element == element && array.dims.size() == 2; }

// How many units of so many bytes make a block.
inline int64_t Together(int64_t bytes) { return std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(bytes, 1)); }

// A matrix of rows of any kind; those of four bits begin at whole bytes.
inline std::string ReadRows(const char* name, const Array& rows, RowType* found) {
  if (rows.dims.size() != 2 || !TypeOf(rows.element, found))
    return std::string(name) + " takes rows [n, d] in f32, bf16, f16, float8, int8 or int4, not " + Shape(rows);
  if (*found == RowType::kS4 && rows.dims[1] % 2)
    return std::string(name) + " takes rows of int4 of an even number of entries, not " + Shape(rows);
  return "";
}

// Which of some rows is the first of n that are read, int32 [].
inline std::string ReadFirst(const char* name, const Array& first, const Array& rows, int64_t n, int64_t* found) {
  if (first.element != Element::kS32 || !first.dims.empty())
    return std::string(name) + " takes the first row's number in int32, not " + Shape(first);
  *found = *first.As<int32_t>();
  if (*found < 0 || *found > rows.dims[0] - n)
    return std::string(name) + " of " + std::to_string(n) + " rows from " + std::to_string(*found) +
           " on do not lie in " + Shape(rows);
  return "";
}

// Scores of all rows from integer products with quantised tokens.
//
//   x      f32 [T, d]
//   rows   int8 [N, d], or uint8 [N, ceil(d / 2)] of entries of 4 bits: n of them are read
//   first  int32 []: the first that is read
//   scale  f32 [n]
//   limbs  1; or 2, where what the first 8 bits of a token lost has 8 more, and `kept` gets the tokens as they are kept
//   out    f32 [T, n]
template <typename Pool>
std::string ScoreRows(Pool& pool, const Kernels& kernels, const Array& x, const Array& rows, const Array& scale,
                      const Array& first, int64_t bits, int limbs, Result<float> out, Result<float> kept) {
  if (bits != 8 && bits != 4) return "scores are of entries of 8 or 4 bits, not " + std::to_string(bits);
  const bool is8 = bits == 8;
  if (!IsMatrix(x, Element::kF32) || !IsMatrix(rows, is8 ? Element::kS8 : Element::kU8))
    return "scores take x [T, d] in f32 and rows of integers, not " + Shape(x) + " and " + Shape(rows);
  const int64_t tokens = x.dims[0], d = x.dims[1], bytes = rows.dims[1];
  const int64_t n = scale.dims.size() == 1 ? scale.dims[0] : -1;
  if (bytes != (is8 ? d : (d + 1) / 2) || scale.element != Element::kF32 || n < 0)
    return "scores take rows and scales that fit " + Shape(x) + ", not " + Shape(rows) + " and " + Shape(scale);
  int64_t begin_row;
  if (std::string wrong = ReadFirst("scores", first, rows, n, &begin_row); !wrong.empty()) return wrong;
  if (std::string wrong = NotOfSize("scores", out, tokens * n); !wrong.empty()) return wrong;
  if (std::string wrong = NotOfSize("kept tokens", kept, limbs == 2 ? tokens * d : 0); !wrong.empty()) return wrong;
  if (tokens == 0) return "";

  const int64_t half = is8 ? 0 : Padded(bytes), stride = is8 ? Padded(d) : 2 * half, at_once = kMostTokens / limbs;
  const int64_t block = (Together(bytes) + 63) / 64 * 64, most = std::min(tokens, at_once);
  std::vector<int8_t> entries(static_cast<size_t>(limbs * most * stride)), flat(static_cast<size_t>(2 * d));
  std::vector<int32_t> sums(static_cast<size_t>(limbs * most));
  std::vector<float> scales(static_cast<size_t>(most));
  for (int64_t begin = 0; begin < tokens; begin += at_once) {
    const int64_t count = std::min(at_once, tokens - begin);
    // Behind each row (or half of it) the entries stay the zeros that they are.
    auto place = [&](const int8_t* q, int64_t number) {
      int8_t* to = entries.data() + number * stride;
      std::copy(q, q + bytes, to);
      std::copy(q + bytes, q + d, to + half);
      sums[static_cast<size_t>(number)] = kernels.sum(q, d);
    };
    for (int64_t t = 0; t < count; ++t) {
      int8_t *first_limb = flat.data(), *second_limb = limbs == 2 ? first_limb + d : nullptr;
      float* own = limbs == 2 ? kept.data + (begin + t) * d : nullptr;
      scales[static_cast<size_t>(t)] = kernels.quantize(x.As<float>() + (begin + t) * d, d, first_limb, second_limb, own);
      place(first_limb, t);
      if (limbs == 2) place(second_limb, count + t);
    }
    Scores s;
    s.rows = rows.As<uint8_t>() + begin_row * bytes;
    s.end = s.rows + n * bytes;
    s.row_bytes = bytes;
    s.bits = static_cast<int>(bits);
    s.tokens = entries.data();
    s.token_stride = stride;
    s.half_stride = half;
    s.sums = sums.data();
    s.count = static_cast<int>(limbs * count);
    s.limbs = limbs;
    s.token_scale = scales.data();
    s.row_scale = scale.As<float>();
    s.out = out.data + begin * n;
    s.n = n;
    ForEachBlock(pool, (n + block - 1) / block,
                 [&](int64_t i) { kernels.scores(s, i * block, std::min(n, (i + 1) * block)); });
  }
  return "";
}

// How an index of one axis (for all tokens) or of two (for each its own) chooses groups of rows.
struct Chosen {
  const int32_t* index;
  int64_t entries;
  bool own;

  const int32_t* Of(int64_t token) const { return own ? index + token * entries : index; }
};

inline std::string ReadIndex(const char* name, const Array& index, const Array& rows, int64_t group, int64_t tokens,
                             Chosen* found) {
  const auto& dims = index.dims;
  if (group < 1 || rows.dims[0] % group)
    return std::string(name) + " takes rows in whole groups of " + std::to_string(group) + ", not " + Shape(rows);
  if (index.element != Element::kS32 || dims.empty() || dims.size() > 2 || (dims.size() == 2 && dims[0] != tokens))
    return std::string(name) + " takes an index [K] or [T, K] in int32, not " + Shape(index);
  *found = {index.As<int32_t>(), dims.back(), dims.size() == 2};
  const int64_t groups = rows.dims[0] / group, all = found->entries * (found->own ? tokens : 1);
  for (int64_t i = 0; i < all; ++i)
    if (found->index[i] < 0 || found->index[i] >= groups)
      return std::string(name) + ": index " + std::to_string(found->index[i]) + " is out of range for " +
             std::to_string(groups) + " groups of rows";
  return "";
}

// A scale [n / rows, d / columns] in f32 of rows of int8 or int4; none where it is of no numbers at all.
inline std::string ReadScale(const char* name, const Array& scale, const Array& rows, Scale* found) {
  *found = {nullptr, 1, 1};
  if (scale.dims == std::vector<int64_t>{0}) return "";
  const int64_t n = rows.dims[0], d = rows.dims[1];
  if ((rows.element != Element::kS8 && rows.element != Element::kS4) || !IsMatrix(scale, Element::kF32) || scale.dims[0] < 1 || scale.dims[1] < 1 ||
      n % scale.dims[0] || d % scale.dims[1])
    return std::string(name) + " takes a scale of rows of int8 or int4 that fits " + Shape(rows) + ", not " + Shape(scale);
  const int64_t columns = d / scale.dims[1];
  if (columns != 1 && columns != d && columns % kScaled)
    return std::string(name) + " takes a scale for one column, all, or a multiple of " + std::to_string(kScaled) +
           ", not " + std::to_string(columns);
  *found = {scale.As<float>(), n / scale.dims[0], columns};
  return "";
}

// Products of chosen rows: x f32 [T, d], rows [n, d] (times a scale: ReadScale), index int32 [K] or [T, K]; out f32 [T, K * group].
template <typename Pool>
std::string SelectRowsDot(Pool& pool, const Kernels& kernels, const Array& x, const Array& rows, const Array& scale,
                          const Array& index, int64_t group, bool magnitudes, Result<float> out) {
  RowType type;
  if (std::string wrong = ReadRows("select_rows_dot", rows, &type); !wrong.empty()) return wrong;
  if (!IsMatrix(x, Element::kF32) || rows.dims[1] != x.dims[1])
    return "select_rows_dot takes rows that fit x in f32 " + Shape(x) + ", not " + Shape(rows);
  const int64_t tokens = x.dims[0], d = x.dims[1];
  Chosen chosen;
  Scale scaled;
  if (std::string wrong = ReadScale("select_rows_dot", scale, rows, &scaled); !wrong.empty()) return wrong;
  if (std::string wrong = ReadIndex("select_rows_dot", index, rows, group, tokens, &chosen); !wrong.empty())
    return wrong;
  if (std::string wrong = NotOfSize("select_rows_dot", out, tokens * chosen.entries * group); !wrong.empty())
    return wrong;
  std::vector<float> sizes;
  const float* given = x.As<float>();
  if (magnitudes) {
    sizes.assign(given, given + tokens * d);
    for (float& value : sizes) value = std::fabs(value);
    given = sizes.data();
  }
  const int64_t step = Together(group * BytesOf(type, d)), blocks = (chosen.entries + step - 1) / step;
  ForEachBlock(pool, (chosen.own ? tokens : 1) * blocks, [&](int64_t i) {
    const int64_t t = i / blocks, first = i % blocks * step, stride = chosen.entries * group;
    const Dots s{rows.As<uint8_t>(), type, scaled, d, chosen.Of(t), group, given + t * d, chosen.own ? 1 : tokens,
                 out.data + t * stride, stride, magnitudes};
    kernels.dots(s, first, std::min(chosen.entries, first + step));
  });
  return "";
}

// Products of n rows in order, from number `first` on: x f32 [T, d], rows [N, d], first int32 []; out f32 [T, n].
template <typename Pool>
std::string Products(Pool& pool, const Kernels& kernels, const Array& x, const Array& rows, const Array& first,
                     int64_t n, Result<float> out) {
  RowType type;
  if (std::string wrong = ReadRows("products", rows, &type); !wrong.empty()) return wrong;
  if (!IsMatrix(x, Element::kF32) || rows.dims[1] != x.dims[1])
    return "products take rows that fit x in f32 " + Shape(x) + ", not " + Shape(rows);
  const int64_t bytes = BytesOf(type, x.dims[1]), step = Together(bytes);
  int64_t begin_row;
  if (std::string wrong = ReadFirst("products", first, rows, n, &begin_row); !wrong.empty()) return wrong;
  if (std::string wrong = NotOfSize("products", out, x.dims[0] * n); !wrong.empty()) return wrong;
  const Dots s{rows.As<uint8_t>() + begin_row * bytes, type, {nullptr, 1, 1}, x.dims[1], nullptr, 1, x.As<float>(), x.dims[0], out.data, n, false};
  ForEachBlock(pool, (n + step - 1) / step,
               [&](int64_t i) { kernels.dots(s, i * step, std::min(n, (i + 1) * step)); });
  return "";
}

// Sums of chosen rows: h f32 [T, K * group], rows [n, d] (times a scale: ReadScale), index int32 [K] or [T, K]; out f32 [T, d].
template <typename Pool>
std::string CombineRows(Pool& pool, const Kernels& kernels, const Array& h, const Array& rows, const Array& scale,
                        const Array& index, int64_t group, Result<float> out) {
  RowType type;
  if (std::string wrong = ReadRows("combine_rows", rows, &type); !wrong.empty()) return wrong;
  if (!IsMatrix(h, Element::kF32))
    return "combine_rows takes h [T, K] in f32 and rows [n, d], not " + Shape(h) + " and " + Shape(rows);
  const int64_t tokens = h.dims[0], d = rows.dims[1];
  Chosen chosen;
  Scale scaled;
  if (std::string wrong = ReadScale("combine_rows", scale, rows, &scaled); !wrong.empty()) return wrong;
  if (std::string wrong = ReadIndex("combine_rows", index, rows, group, tokens, &chosen); !wrong.empty()) return wrong;
  if (h.dims[1] != chosen.entries * group)
    return "combine_rows takes an index that fits " + Shape(h) + ", not " + Shape(index);
  if (std::string wrong = NotOfSize("combine_rows", out, tokens * d); !wrong.empty()) return wrong;
  const int64_t sets = chosen.own ? tokens : 1, together = chosen.own ? 1 : tokens, size = together * d;
  const int64_t step = std::max(Together(group * BytesOf(type, d)), (chosen.entries + kMostParts - 1) / kMostParts);
  const int64_t parts = std::max<int64_t>(1, (chosen.entries + step - 1) / step);
  // A part's numbers are added to those of its neighbour by whichever is ready last, then those of both to those of the
  // next two, and so on: in an order that hangs on shapes alone, while both still lie in a cache.
  std::unique_ptr<float[]> totals(new float[static_cast<size_t>(sets * parts * size)]);
  std::vector<std::atomic<bool>> waits(static_cast<size_t>(sets * parts));
  ForEachBlock(pool, sets * parts, [&](int64_t i) {
    const int64_t t = i / parts, part = i % parts, first = part * step;
    float* own = totals.get() + t * parts * size;
    const Sums s{rows.As<uint8_t>(), type, scaled, d, chosen.Of(t), group, h.As<float>() + t * h.dims[1], h.dims[1], together};
    kernels.sums(s, first, std::min(chosen.entries, first + step), own + part * size);
    for (int64_t wide = 1; wide < parts; wide *= 2) {
      const int64_t left = part / (2 * wide) * (2 * wide), right = left + wide;
      if (right >= parts) continue;
      if (!waits[static_cast<size_t>(t * parts + right)].exchange(true, std::memory_order_acq_rel)) return;
      float* to = own + left * size;
      const float* from = own + right * size;
      for (int64_t j = 0; j < size; ++j) to[j] += from[j];
    }
    std::copy(own, own + size, out.data + t * size);
  });
  return "";
}

// The largest of each shard: scores f32 [..., n], of which `picked` of the last axis are written, those of a shard from the
// largest down or, if not `ordered`, in any order.
template <typename Pool>
std::string LargestOf(Pool& pool, const Kernels& kernels, const Array& scores, int64_t picked, int64_t shards,
                      bool ordered, Result<float> values, Result<int32_t> indices) {
  if (scores.element != Element::kF32 || scores.dims.empty()) return "da_top_k takes scores [..., n] in f32";
  const int64_t n = scores.dims.back();
  if (shards < 1 || n % shards || picked % shards || picked > n || picked < shards || n > 0x7fffffff)
    return "da_top_k takes " + std::to_string(shards) + " equal shards, not " + Shape(scores);
  int64_t lead = 1;
  for (size_t i = 0; i + 1 < scores.dims.size(); ++i) lead *= scores.dims[i];
  if (std::string wrong = NotOfSize("da_top_k", values, lead * picked); !wrong.empty()) return wrong;
  if (std::string wrong = NotOfSize("da_top_k", indices, lead * picked); !wrong.empty()) return wrong;
  const int64_t block = n / shards, own = picked / shards;
  auto pick = [&](auto& threads, int64_t i) {
    Largest(threads, kernels, scores.As<float>() + i * block, block, own, i % shards * block, ordered, values.data + i * own,
            indices.data + i * own);
  };
  if (lead * shards < 4 * static_cast<int64_t>(pool.num_threads())) {
    for (int64_t i = 0; i < lead * shards; ++i) pick(pool, i);
  } else {
    // Many of them: each thread takes some by itself.
    Alone alone;
    ForEachBlock(pool, lead * shards, [&](int64_t i) { pick(alone, i); });
  }
  return "";
}

// Where the first NaN of the last axis stands, or the first of the largest: values f32 [..., n]; out int32 [...].
template <typename Pool>
std::string ArgMax(Pool& pool, const Kernels& kernels, const Array& values, Result<int32_t> out) {
  if (values.element != Element::kF32 || values.dims.empty()) return "arg_max takes values [..., n] in f32";
  const int64_t n = values.dims.back(), parts = (n + kValuesABlock - 1) / kValuesABlock;
  int64_t lead = 1;
  for (size_t i = 0; i + 1 < values.dims.size(); ++i) lead *= values.dims[i];
  if (std::string wrong = NotOfSize("arg_max", out, lead); !wrong.empty()) return wrong;
  if (n < 1 || n > 0x7fffffff) return "arg_max takes an axis of 1 to 2^31 - 1 values, not " + Shape(values);
  std::vector<int64_t> found(static_cast<size_t>(lead * parts));
  ForEachBlock(pool, lead * parts, [&](int64_t i) {
    const int64_t first = i % parts * kValuesABlock;
    const float* own = values.As<float>() + i / parts * n + first;
    found[static_cast<size_t>(i)] = first + kernels.arg_max(own, std::min(kValuesABlock, n - first));
  });
  for (int64_t i = 0; i < lead; ++i) {
    const float* own = values.As<float>() + i * n;
    int64_t best = found[static_cast<size_t>(i * parts)];
    for (int64_t part = 1; part < parts; ++part) {
      const int64_t other = found[static_cast<size_t>(i * parts + part)];
      // A NaN is not to be outdone.
      if (own[best] == own[best] && !(own[other] <= own[best])) best = other;
    }
    out.data[i] = static_cast<int32_t>(best);
  }
  return "";
}

// Where values stand that are not below zero, NaNs among them, ascending, and then zeros; and how many they are:
// values f32 [n]; out int32 [n], count int32 [].
template <typename Pool>
std::string OpenRows(Pool& pool, const Kernels& kernels, const Array& values, Result<int32_t> out,
                     Result<int32_t> count) {
  if (values.element != Element::kF32 || values.dims.size() != 1 || values.dims[0] > 0x7fffffff)
    return "open_rows takes values [n] in f32, not " + Shape(values);
  const int64_t n = values.dims[0], parts = (n + kValuesABlock - 1) / kValuesABlock;
  if (std::string wrong = NotOfSize("open_rows", out, n); !wrong.empty()) return wrong;
  if (std::string wrong = NotOfSize("open_rows", count, 1); !wrong.empty()) return wrong;
  std::vector<int64_t> found(static_cast<size_t>(parts));
  ForEachBlock(pool, parts, [&](int64_t part) {
    const int64_t first = part * kValuesABlock, size = std::min(kValuesABlock, n - first);
    found[static_cast<size_t>(part)] = kernels.not_below(values.As<float>() + first, size, 0.0f, out.data + first);
  });
  int64_t total = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * kValuesABlock;
    // What is behind lies further on: each is read before it is written over.
    for (int64_t i = 0; i < found[static_cast<size_t>(part)]; ++i)
      out.data[total++] = out.data[first + i] + static_cast<int32_t>(first);
  }
  std::fill(out.data + total, out.data + n, 0);
  count.data[0] = static_cast<int32_t>(total);
  return "";
}

}  // namespace hire

#endif  // HIRE_STEPS_H_
