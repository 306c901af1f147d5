// What XLA calls: shapes and indices are checked, tokens are quantised, and blocks of rows are handed to threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "largest.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace hire {
namespace {

namespace ffi = xla::ffi;

// Bytes of rows that a thread takes at a time: many blocks for every thread, few enough that taking one costs nothing.
constexpr int64_t kBlockBytes = 128 * 1024;
// Parts that a sum over rows is made in, at most: their number hangs on shapes alone, so that results repeat.
constexpr int64_t kMostParts = 64;

std::vector<const Kernels*> Supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
}

std::atomic<const Kernels*>& InUse() {
  static std::atomic<const Kernels*> kernels{Supported().front()};
  return kernels;
}

ffi::Error Wrong(const std::string& what) { return ffi::Error::InvalidArgument("hire_xform: " + what); }

template <typename Buffer>
std::string Shape(const Buffer& buffer) {
  std::string text = "[";
  for (int64_t size : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

bool TypeOf(ffi::DataType type, RowType* found) {
  switch (type) {
    case ffi::F32: *found = RowType::kF32; return true;
    case ffi::BF16: *found = RowType::kBF16; return true;
    case ffi::F16: *found = RowType::kF16; return true;
    case ffi::S8: *found = RowType::kS8; return true;
    default: return false;
  }
}

int64_t Rounded(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// One token in integers of 8 bits and a scale, as `quantize` in lowering/predict has it: all zero and of scale NaN where
// an entry is not finite, and of scale zero where all are.
float QuantizeToken(const float* x, int64_t d, int8_t* q) {
  float peak = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < d; ++i) {
    const float size = std::fabs(x[i]);
    finite &= size <= std::numeric_limits<float>::max();
    peak = size > peak ? size : peak;
  }
  const float scale = finite ? peak / 127.0f : std::numeric_limits<float>::quiet_NaN();
  if (!(scale > 0.0f)) return scale;
  // Adding and subtracting this rounds a number of up to 2^22 to the nearest integer, ties to even.
  constexpr float kRound = 12582912.0f;
  for (int64_t i = 0; i < d; ++i) {
    const float rounded = (x[i] / scale + kRound) - kRound;
    q[i] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, rounded)));
  }
  return scale;
}

// What one limb lost, in steps of 1/254 of the scale; `kept` is what both keep.
void QuantizeRest(const float* x, int64_t d, float scale, const int8_t* first, int8_t* second, float* kept) {
  constexpr float kRound = 12582912.0f;
  const float divisor = scale > 0.0f ? scale : 1.0f;
  for (int64_t i = 0; i < d; ++i) {
    const float one = static_cast<float>(first[i]);
    const float rest = (x[i] - one * scale) / divisor;
    const float rounded = (rest * 254.0f + kRound) - kRound;
    const bool usable = scale > 0.0f;
    second[i] = usable ? static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, rounded))) : int8_t{0};
    kept[i] = (one + static_cast<float>(second[i]) / 254.0f) * scale;
  }
}

ffi::Error Score(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer rows, ffi::Buffer<ffi::F32> scale,
                 int64_t bits, int limbs, float* out, float* kept) {
  const auto dims = x.dimensions(), shape = rows.dimensions();
  if (dims.size() != 2 || shape.size() != 2) return Wrong("scores take x [T, d] and rows of two axes");
  const int64_t tokens = dims[0], d = dims[1], n = shape[0], bytes = shape[1];
  if (bits != 8 && bits != 4) return Wrong("scores take entries of 8 or 4 bits, not " + std::to_string(bits));
  const bool is8 = bits == 8;
  if (rows.element_type() != (is8 ? ffi::S8 : ffi::U8) || bytes != (is8 ? d : (d + 1) / 2) ||
      scale.dimensions().size() != 1 || scale.dimensions()[0] != n)
    return Wrong("scores take rows and scales that fit " + Shape(x) + ", not " + Shape(rows) + " and " + Shape(scale));
  if (n == 0 || tokens == 0) return ffi::Error::Success();

  const int64_t half = is8 ? 0 : Padded(bytes), stride = is8 ? Padded(d) : 2 * half, at_once = kMostTokens / limbs;
  const int64_t block = Rounded(std::max<int64_t>(kBlockBytes / std::max<int64_t>(bytes, 1), 1), 64);
  const int64_t most = std::min(tokens, at_once);
  std::vector<int8_t> entries(static_cast<size_t>(limbs * most * stride)), flat(static_cast<size_t>(2 * d));
  std::vector<int32_t> sums(static_cast<size_t>(limbs * most));
  std::vector<float> scales(static_cast<size_t>(most));
  for (int64_t begin = 0; begin < tokens; begin += at_once) {
    const int64_t count = std::min(at_once, tokens - begin);
    std::fill(entries.begin(), entries.end(), int8_t{0});
    auto place = [&](const int8_t* q, int64_t number) {
      int8_t* to = entries.data() + number * stride;
      int32_t sum = 0;
      for (int64_t i = 0; i < d; ++i) {
        to[i < bytes ? i : half + i - bytes] = q[i];
        sum += q[i];
      }
      sums[number] = sum;
    };
    for (int64_t t = 0; t < count; ++t) {
      const float* token = x.typed_data() + (begin + t) * d;
      std::fill(flat.begin(), flat.end(), int8_t{0});
      scales[t] = QuantizeToken(token, d, flat.data());
      place(flat.data(), t);
      if (limbs == 2) {
        QuantizeRest(token, d, scales[t], flat.data(), flat.data() + d, kept + (begin + t) * d);
        place(flat.data() + d, count + t);
      }
    }
    Scores s;
    s.rows = static_cast<const uint8_t*>(rows.untyped_data());
    s.row_bytes = bytes;
    s.bits = static_cast<int>(bits);
    s.tokens = entries.data();
    s.token_stride = stride;
    s.half_stride = half;
    s.sums = sums.data();
    s.count = static_cast<int>(limbs * count);
    s.limbs = limbs;
    s.token_scale = scales.data();
    s.row_scale = scale.typed_data();
    s.out = out + begin * n;
    s.n = n;
    const Kernels* kernels = InUse().load(std::memory_order_relaxed);
    ForEachBlock(pool, (n + block - 1) / block,
                 [&](int64_t i) { kernels->scores(s, i * block, std::min(n, (i + 1) * block)); });
  }
  return ffi::Error::Success();
}

ffi::Error ScoresImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer rows, ffi::Buffer<ffi::F32> scale,
                      ffi::ResultBuffer<ffi::F32> out, int64_t bits) {
  return Score(pool, x, rows, scale, bits, 1, out->typed_data(), nullptr);
}

ffi::Error FineScoresImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer rows,
                          ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> out,
                          ffi::ResultBuffer<ffi::F32> kept, int64_t bits) {
  return Score(pool, x, rows, scale, bits, 2, out->typed_data(), kept->typed_data());
}

// How an index of one axis (for all tokens) or of two (for each its own) chooses groups of rows.
struct Chosen {
  const int32_t* index;
  int64_t entries;
  bool own;

  const int32_t* Of(int64_t token) const { return own ? index + token * entries : index; }
};

ffi::Error ReadIndex(const char* name, const ffi::Buffer<ffi::S32>& index, const ffi::AnyBuffer& rows, int64_t group,
                     int64_t tokens, Chosen* found) {
  const auto dims = index.dimensions(), shape = rows.dimensions();
  if (shape.size() != 2 || group < 1 || shape[0] % group)
    return Wrong(std::string(name) + " takes rows [n, d] in whole groups, not " + Shape(rows));
  if (dims.size() < 1 || dims.size() > 2 || (dims.size() == 2 && dims[0] != tokens))
    return Wrong(std::string(name) + " takes an index [K] or [T, K], not " + Shape(index));
  found->index = index.typed_data();
  found->own = dims.size() == 2;
  found->entries = dims[dims.size() - 1];
  const int64_t groups = shape[0] / group, all = found->entries * (found->own ? tokens : 1);
  for (int64_t i = 0; i < all; ++i)
    if (found->index[i] < 0 || found->index[i] >= groups)
      return Wrong(std::string(name) + ": index " + std::to_string(found->index[i]) + " is out of range for " +
                   std::to_string(groups) + " groups of rows");
  return ffi::Error::Success();
}

ffi::Error SelectRowsDotImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer rows,
                             ffi::Buffer<ffi::S32> index, ffi::ResultBuffer<ffi::F32> out, int64_t group,
                             bool magnitudes) {
  const auto dims = x.dimensions();
  RowType type;
  if (!TypeOf(rows.element_type(), &type)) return Wrong("select_rows_dot takes rows in f32, bf16, f16 or int8");
  if (dims.size() != 2 || rows.dimensions().size() != 2 || rows.dimensions()[1] != dims[1])
    return Wrong("select_rows_dot takes rows that fit " + Shape(x) + ", not " + Shape(rows));
  const int64_t tokens = dims[0], d = dims[1];
  Chosen chosen;
  if (ffi::Error error = ReadIndex("select_rows_dot", index, rows, group, tokens, &chosen); error.failure())
    return error;
  std::vector<float> sizes;
  const float* given = x.typed_data();
  if (magnitudes) {
    sizes.assign(given, given + tokens * d);
    for (float& value : sizes) value = std::fabs(value);
    given = sizes.data();
  }
  const int64_t step = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(group * d * BytesOf(type), 1));
  const int64_t blocks = (chosen.entries + step - 1) / step, sets = chosen.own ? tokens : 1;
  const Kernels* kernels = InUse().load(std::memory_order_relaxed);
  ForEachBlock(pool, sets * blocks, [&](int64_t i) {
    const int64_t t = i / blocks, first = i % blocks * step;
    Dots s;
    s.rows = static_cast<const uint8_t*>(rows.untyped_data());
    s.type = type;
    s.d = d;
    s.index = chosen.Of(t);
    s.group = group;
    s.x = given + t * d;
    s.tokens = chosen.own ? 1 : tokens;
    s.stride = chosen.entries * group;
    s.out = out->typed_data() + t * s.stride;
    s.magnitudes = magnitudes;
    kernels->dots(s, first, std::min(chosen.entries, first + step));
  });
  return ffi::Error::Success();
}

ffi::Error ProductsImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer rows,
                        ffi::ResultBuffer<ffi::F32> out) {
  const auto dims = x.dimensions(), shape = rows.dimensions();
  RowType type;
  if (!TypeOf(rows.element_type(), &type)) return Wrong("products take rows in f32, bf16, f16 or int8");
  if (dims.size() != 2 || shape.size() != 2 || shape[1] != dims[1])
    return Wrong("products take rows that fit " + Shape(x) + ", not " + Shape(rows));
  const int64_t n = shape[0], step = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(dims[1] * BytesOf(type), 1));
  Dots s{static_cast<const uint8_t*>(rows.untyped_data()), type, dims[1], nullptr, 1, x.typed_data(), dims[0],
         out->typed_data(), n, false};
  const Kernels* kernels = InUse().load(std::memory_order_relaxed);
  ForEachBlock(pool, (n + step - 1) / step,
               [&](int64_t i) { kernels->dots(s, i * step, std::min(n, (i + 1) * step)); });
  return ffi::Error::Success();
}

ffi::Error CombineRowsImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> h, ffi::AnyBuffer rows,
                           ffi::Buffer<ffi::S32> index, ffi::ResultBuffer<ffi::F32> out, int64_t group) {
  const auto dims = h.dimensions();
  RowType type;
  if (!TypeOf(rows.element_type(), &type)) return Wrong("combine_rows takes rows in f32, bf16, f16 or int8");
  if (dims.size() != 2 || rows.dimensions().size() != 2) return Wrong("combine_rows takes h [T, K] and rows [n, d]");
  const int64_t tokens = dims[0], d = rows.dimensions()[1];
  Chosen chosen;
  if (ffi::Error error = ReadIndex("combine_rows", index, rows, group, tokens, &chosen); error.failure()) return error;
  if (dims[1] != chosen.entries * group)
    return Wrong("combine_rows takes an index that fits " + Shape(h) + ", not " + Shape(index));
  const int64_t sets = chosen.own ? tokens : 1, together = chosen.own ? 1 : tokens;
  const int64_t fitting = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(group * d * BytesOf(type), 1));
  const int64_t step = std::max({fitting, (chosen.entries + kMostParts - 1) / kMostParts, int64_t{1}});
  const int64_t parts = std::max<int64_t>(1, (chosen.entries + step - 1) / step), size = together * d;
  std::unique_ptr<float[]> totals(new float[static_cast<size_t>(sets * parts * size)]);
  const Kernels* kernels = InUse().load(std::memory_order_relaxed);
  ForEachBlock(pool, sets * parts, [&](int64_t i) {
    const int64_t t = i / parts, first = i % parts * step;
    Sums s{static_cast<const uint8_t*>(rows.untyped_data()), type, d, chosen.Of(t), group,
           h.typed_data() + t * dims[1], dims[1], together};
    kernels->sums(s, first, std::min(chosen.entries, first + step), totals.get() + i * size);
  });
  for (int64_t t = 0; t < sets; ++t) {
    float* to = out->typed_data() + t * size;
    const float* from = totals.get() + t * parts * size;
    std::copy(from, from + size, to);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t j = 0; j < size; ++j) to[j] += from[part * size + j];
  }
  return ffi::Error::Success();
}

ffi::Error LargestImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> scores, ffi::ResultBuffer<ffi::F32> values,
                       ffi::ResultBuffer<ffi::S32> indices, int64_t shards) {
  const auto dims = scores.dimensions(), picked = values->dimensions();
  if (dims.size() < 1 || shards < 1 || picked.size() != dims.size()) return Wrong("da_top_k takes scores [..., n]");
  const int64_t n = dims[dims.size() - 1], size = picked[picked.size() - 1];
  if (n % shards || size % shards || size > n || size < shards || n > 0x7fffffff)
    return Wrong("da_top_k takes " + std::to_string(shards) + " equal shards, not " + Shape(scores));
  int64_t lead = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) lead *= dims[i];
  const int64_t block = n / shards, own = size / shards;
  for (int64_t i = 0; i < lead * shards; ++i)
    Largest(pool, scores.typed_data() + i * block, block, own, i % shards * block, values->typed_data() + i * own,
            indices->typed_data() + i * own);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace hire

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_scores, hire::ScoresImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_fine_scores, hire::FineScoresImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_products, hire::ProductsImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_select_rows_dot, hire::SelectRowsDotImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("magnitudes"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_combine_rows, hire::CombineRowsImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("group"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_largest, hire::LargestImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<int64_t>("shards"));

extern "C" {

// The number of instruction sets that this processor runs, and the name of one, the fastest first.
int hire_instruction_sets() { return static_cast<int>(hire::Supported().size()); }
const char* hire_instruction_set(int number) {
  const auto found = hire::Supported();
  return number >= 0 && number < static_cast<int>(found.size()) ? found[number]->name : nullptr;
}
// Has all later calls run the loops of that number; whether there is one.
int hire_use(int number) {
  const auto found = hire::Supported();
  if (number < 0 || number >= static_cast<int>(found.size())) return 0;
  hire::InUse().store(found[number]);
  return 1;
}
}

#pragma GCC visibility pop
