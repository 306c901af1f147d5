// Runs the steps of lowering/kernels/cpu on random shapes with every instruction set there is, and compares with sums
// written out. Built with sanitizers by test_sanitizers.py; arrays are of their exact size, so that a read or a write
// one element too far is seen.
//
//   fuzz SEED COUNT
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "steps.h"

namespace {

using hire::Array;
using hire::Element;
using hire::Kernels;

// Starts a thread for each task, and joins all at its end.
class Threads {
 public:
  explicit Threads(int count) : count_(count) {}
  ~Threads() { Join(); }
  int64_t num_threads() const { return count_; }
  template <typename Task>
  void Schedule(Task task) {
    threads_.emplace_back(std::move(task));
  }
  void Join() {
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  int64_t count_;
  std::vector<std::thread> threads_;
};

std::mt19937_64 generator;

int64_t Up(int64_t most) { return std::uniform_int_distribution<int64_t>(1, most)(generator); }
float Normal() { return std::normal_distribution<float>()(generator); }

void Expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void Expect(const std::string& wrong) { Expect(wrong.empty(), wrong.c_str()); }

bool Near(double got, double want, double size) { return std::fabs(got - want) <= 1e-5 * size + 1e-6; }

std::vector<float> Floats(int64_t size) {
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = Normal();
  return values;
}

// One integer.
Array Number(const int32_t& value) { return {&value, Element::kS32, {}}; }

Array F32(const std::vector<float>& values, std::vector<int64_t> dims) { return {values.data(), Element::kF32, dims}; }

// A matrix of one of the types, and what it holds.
struct Rows {
  std::vector<uint8_t> bytes;
  std::vector<float> values;
  Array array;

  Rows(Element element, int64_t n, int64_t d) {
    const bool wide = element == Element::kBF16 || element == Element::kF16;
    const int64_t size = element == Element::kF32 ? 4 : wide ? 2 : 1;
    bytes.resize(static_cast<size_t>(element == Element::kS4 ? n * d / 2 : n * d * size));
    for (int64_t i = 0; i < n * d; ++i) {
      const float drawn = Normal();
      uint32_t bits;
      std::memcpy(&bits, &drawn, 4);
      float kept = drawn;
      if (element == Element::kF32) {
        std::memcpy(&bytes[static_cast<size_t>(4 * i)], &drawn, 4);
      } else if (element == Element::kS4) {
        const int entry = static_cast<int>(Up(16)) - 9;
        bytes[static_cast<size_t>(i / 2)] |= static_cast<uint8_t>((entry & 0xf) << (i % 2 * 4));
        kept = static_cast<float>(entry);
      } else if (element == Element::kS8) {
        const auto entry = static_cast<int8_t>(static_cast<int>(Up(256)) - 129);
        bytes[static_cast<size_t>(i)] = static_cast<uint8_t>(entry);
        kept = entry;
      } else if (element == Element::kBF16) {
        const auto half = static_cast<uint16_t>(bits >> 16);
        std::memcpy(&bytes[static_cast<size_t>(2 * i)], &half, 2);
        bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&kept, &bits, 4);
      } else if (element == Element::kE4M3 || element == Element::kE5M2) {
        // Any finite number, but for the largest ones: sign, exponent, fraction.
        const int places = element == Element::kE4M3 ? 3 : 2, bias = element == Element::kE4M3 ? 7 : 15;
        const int exponent = static_cast<int>(Up(2 * bias + 1)) - 1, fraction = static_cast<int>(Up(1 << places)) - 1;
        const bool negative = Up(2) == 1;
        bytes[static_cast<size_t>(i)] = static_cast<uint8_t>((negative ? 0x80 : 0) | exponent << places | fraction);
        kept = exponent ? std::ldexp(static_cast<float>((1 << places) + fraction), exponent - bias - places)
                        : std::ldexp(static_cast<float>(fraction), 1 - bias - places);
        if (negative) kept = -kept;
      } else {
        // Any finite f16: sign, exponent below 31, fraction.
        const auto half = static_cast<uint16_t>(((Up(2) - 1) << 15) | ((Up(31) - 1) << 10) | (Up(1024) - 1));
        std::memcpy(&bytes[static_cast<size_t>(2 * i)], &half, 2);
        const int exponent = (half >> 10) & 31, fraction = half & 1023;
        kept = exponent ? std::ldexp(1024.0f + static_cast<float>(fraction), exponent - 25)
                        : std::ldexp(static_cast<float>(fraction), -24);
        if (half & 0x8000) kept = -kept;
      }
      values.push_back(kept);
    }
    array = {bytes.data(), element, {n, d}};
  }
};

void FuzzScores(Threads& pool, const Kernels& kernels) {
  const int bits = Up(2) == 1 ? 8 : 4, limbs = static_cast<int>(Up(2));
  const int64_t tokens = Up(9), n = Up(300), d = Up(200), bytes = bits == 8 ? d : (d + 1) / 2;
  const auto x = Floats(tokens * d), scale = Floats(n);
  std::vector<uint8_t> rows(static_cast<size_t>(n * bytes));
  std::vector<int> entries(static_cast<size_t>(n * d));
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < d; ++i) {
      const int entry = static_cast<int>(Up(bits == 8 ? 255 : 15)) - (bits == 8 ? 128 : 8);
      entries[static_cast<size_t>(r * d + i)] = entry;
      uint8_t& at = rows[static_cast<size_t>(r * bytes + i % bytes)];
      if (bits == 8)
        at = static_cast<uint8_t>(static_cast<int8_t>(entry));
      else
        at = static_cast<uint8_t>(i < bytes ? (at & 0xf0) | (entry & 0xf) : (at & 0xf) | ((entry & 0xf) << 4));
    }
  std::vector<float> out(static_cast<size_t>(tokens * n)), kept(static_cast<size_t>(limbs == 2 ? tokens * d : 0));
  // Often the rows lie among others.
  const auto before = static_cast<int32_t>(Up(3) == 1 ? Up(70) - 1 : 0), behind = static_cast<int32_t>(Up(3) - 1);
  rows.insert(rows.begin(), static_cast<size_t>(before * bytes), uint8_t{0x5a});
  rows.insert(rows.end(), static_cast<size_t>(behind * bytes), uint8_t{0x5a});
  const Array packed{rows.data(), bits == 8 ? Element::kS8 : Element::kU8, {before + n + behind, bytes}};
  Expect(hire::ScoreRows(pool, kernels, F32(x, {tokens, d}), packed, F32(scale, {n}), Number(before), bits, limbs,
                         {out.data(), tokens * n}, {kept.data(), limbs == 2 ? tokens * d : 0}));
  for (int64_t t = 0; t < tokens; ++t) {
    double peak = 0;
    for (int64_t i = 0; i < d; ++i) peak = std::max(peak, std::fabs(static_cast<double>(x[t * d + i])));
    for (int64_t r = 0; r < n; ++r) {
      double want = 0, size = 0, lost = 0;
      for (int64_t i = 0; i < d; ++i) {
        const double entry = entries[static_cast<size_t>(r * d + i)];
        want += (limbs == 2 ? kept[t * d + i] : x[t * d + i]) * entry * scale[r];
        size += std::fabs(x[t * d + i] * entry * scale[r]);
        lost += std::fabs(entry * scale[r]) * peak / 127;
      }
      Expect(std::fabs(out[t * n + r] - want) <= 1e-5 * size + (limbs == 2 ? 1e-6 : 0.51 * lost + 1e-6), "scores");
    }
    for (int64_t i = 0; i < d && limbs == 2; ++i)
      Expect(std::fabs(kept[t * d + i] - x[t * d + i]) <= peak / 127 / 254 * 0.51, "kept tokens");
  }
}

void FuzzRows(Threads& pool, const Kernels& kernels) {
  const Element elements[] = {Element::kF32,  Element::kBF16, Element::kF16,
                              Element::kE4M3, Element::kE5M2, Element::kS8, Element::kS4};
  const int64_t group = Up(4), n = group * Up(40), tokens = Up(9), k = Up(50) - 1;
  const Element element = elements[Up(7) - 1];
  // Rows of four bits begin at whole bytes.
  const int64_t drawn = Up(3) == 1 ? 64 * Up(3) : Up(150), d = element == Element::kS4 ? drawn + drawn % 2 : drawn;
  const Rows rows(element, n, d);
  // What rows of integers are multiplied with, for some rows and columns.
  const bool scaled = (element == Element::kS8 || element == Element::kS4) && Up(4) > 1;
  const int64_t row_set[] = {1, group, n}, column_set[] = {1, d, d % 64 ? d : 64};
  const int64_t tall = row_set[Up(3) - 1], wide = column_set[Up(3) - 1];
  const auto factors = Floats(scaled ? n / tall * (d / wide) : 0);
  const Array scale = F32(factors, scaled ? std::vector<int64_t>{n / tall, d / wide} : std::vector<int64_t>{0});
  const bool own = Up(2) == 1, magnitudes = Up(2) == 1;
  std::vector<int32_t> index(static_cast<size_t>(own ? tokens * k : k));
  for (int32_t& i : index) i = static_cast<int32_t>(Up(n / group) - 1);
  const Array chosen{index.data(), Element::kS32, own ? std::vector<int64_t>{tokens, k} : std::vector<int64_t>{k}};
  auto row_of = [&](int64_t t, int64_t i) { return index[(own ? t * k : 0) + i / group] * group + i % group; };
  auto at = [&](int64_t row, int64_t j) {
    const float factor = scaled ? factors[row / tall * (d / wide) + j / wide] : 1.0f;
    return static_cast<double>(rows.values[row * d + j] * factor);
  };

  const auto x = Floats(tokens * d), h = Floats(tokens * k * group);
  std::vector<float> dots(static_cast<size_t>(tokens * k * group)), sums(static_cast<size_t>(tokens * d));
  const auto first = static_cast<int32_t>(Up(n) - 1);
  const int64_t from_first = n - first;
  std::vector<float> all(static_cast<size_t>(tokens * from_first));
  Expect(hire::SelectRowsDot(pool, kernels, F32(x, {tokens, d}), rows.array, scale, chosen, group, magnitudes,
                             {dots.data(), tokens * k * group}));
  Expect(hire::Products(pool, kernels, F32(x, {tokens, d}), rows.array, Number(first), from_first,
                        {all.data(), tokens * from_first}));
  Expect(hire::CombineRows(pool, kernels, F32(h, {tokens, k * group}), rows.array, scale, chosen, group,
                           {sums.data(), tokens * d}));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < n; ++r) {
      double plain = 0, size = 0;
      for (int64_t j = 0; j < d; ++j) {
        plain += at(r, j) * x[t * d + j];
        size += std::fabs(at(r, j) * x[t * d + j]);
      }
      if (!scaled && r >= first) Expect(Near(all[t * from_first + r - first], plain, size), "products");
      for (int64_t i = 0; i < k * group; ++i)
        if (row_of(t, i) == r) Expect(Near(dots[t * k * group + i], magnitudes ? size : plain, size), "chosen rows");
    }
    for (int64_t j = 0; j < d; ++j) {
      double plain = 0, size = 0;
      for (int64_t i = 0; i < k * group; ++i) {
        plain += at(row_of(t, i), j) * h[t * k * group + i];
        size += std::fabs(at(row_of(t, i), j) * h[t * k * group + i]);
      }
      Expect(Near(sums[t * d + j], plain, size), "sums of rows");
    }
  }
}

void FuzzLargest(Threads& pool, const Kernels& kernels) {
  const int64_t shards = Up(4), block = Up(Up(4) == 1 ? 40000 : 300), lead = Up(3), own = Up(block), n = shards * block;
  const bool ordered = Up(2) == 1, many_zeros = Up(3) == 1;
  std::vector<float> scores = Floats(lead * n);
  for (float& score : scores) {
    if (Up(3) == 1) score = std::nearbyint(score);  // ties, and zeros of both signs
    if (many_zeros && Up(20) > 1) score = Up(500) == 1 ? 1e-40f : 0.0f;  // as behind a ReLU, and denormals
    if (Up(200) == 1) score = std::numeric_limits<float>::quiet_NaN();
    if (Up(200) == 1) score = -std::numeric_limits<float>::infinity();
  }
  std::vector<float> values(static_cast<size_t>(lead * shards * own));
  std::vector<int32_t> indices(values.size());
  const auto size = static_cast<int64_t>(values.size());
  Expect(hire::LargestOf(pool, kernels, F32(scores, {lead, n}), shards * own, shards, ordered, {values.data(), size},
                         {indices.data(), size}));
  for (int64_t part = 0; part < lead * shards; ++part) {
    const int64_t first = part % shards * block;
    std::vector<int32_t> order(static_cast<size_t>(block));
    for (int64_t i = 0; i < block; ++i) order[i] = static_cast<int32_t>(i);
    const float* from = scores.data() + part * block;
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return hire::KeyOf(from[a]) > hire::KeyOf(from[b]); });
    if (!ordered) {
      // Each value beside its index, by rank.
      std::vector<int32_t> rank(static_cast<size_t>(block));
      for (int64_t i = 0; i < block; ++i) rank[order[i]] = static_cast<int32_t>(i);
      std::vector<std::pair<int32_t, float>> found;
      for (int64_t i = part * own; i < (part + 1) * own; ++i)
        found.emplace_back(rank.at(static_cast<size_t>(indices[i] - first)), values[i]);
      std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
      for (int64_t i = 0; i < own; ++i) {
        indices[part * own + i] = static_cast<int32_t>(first + order[found[i].first]);
        values[part * own + i] = found[i].second;
      }
    }
    for (int64_t i = 0; i < own; ++i) {
      Expect(indices[part * own + i] == first + order[i], "where the largest stand");
      Expect(hire::KeyOf(values[part * own + i]) == hire::KeyOf(from[order[i]]), "the largest");
    }
  }
}

void FuzzArgMax(Threads& pool, const Kernels& kernels) {
  const int64_t n = Up(Up(3) == 1 ? 100000 : 3000), lead = Up(3), top = Up(4);
  std::vector<float> values = Floats(lead * n);
  for (float& value : values) {
    if (top > 1) value = std::min(value, static_cast<float>(top - 2));  // ties
    if (top == 4 && Up(n) == 1) value = std::numeric_limits<float>::quiet_NaN();
    if (Up(9) == 1) value = -std::numeric_limits<float>::infinity();
  }
  std::vector<int32_t> found(static_cast<size_t>(lead));
  Expect(hire::ArgMax(pool, kernels, F32(values, {lead, n}), {found.data(), lead}));
  for (int64_t i = 0; i < lead; ++i) {
    const float* own = values.data() + i * n;
    int64_t best = 0;
    for (int64_t j = 1; j < n; ++j)
      if (own[best] == own[best] && !(own[j] <= own[best])) best = j;
    Expect(found[static_cast<size_t>(i)] == best, "the arg max");
  }
}

void FuzzOpenRows(Threads& pool, const Kernels& kernels) {
  const int64_t n = Up(Up(3) == 1 ? 100000 : 300), often = Up(20);
  std::vector<float> values = Floats(n);
  for (float& value : values) {
    if (Up(often) > 1) value = -std::fabs(value);
    if (Up(50) == 1) value = std::numeric_limits<float>::quiet_NaN();
    if (Up(50) == 1) value = Up(2) == 1 ? 0.0f : -0.0f;
  }
  std::vector<int32_t> found(static_cast<size_t>(n)), wanted;
  int32_t count = -1;
  Expect(hire::OpenRows(pool, kernels, F32(values, {n}), {found.data(), n}, {&count, 1}));
  for (int64_t i = 0; i < n; ++i)
    if (!(values[static_cast<size_t>(i)] < 0.0f)) wanted.push_back(static_cast<int32_t>(i));
  Expect(count == static_cast<int32_t>(wanted.size()), "how many rows are open");
  wanted.resize(static_cast<size_t>(n), 0);
  Expect(found == wanted, "which rows are open");
}

// What does not fit is refused before any of it is read.
void FuzzRefusals(Threads& pool, const Kernels& kernels) {
  const auto x = Floats(6), rows = Floats(12);
  float out[6];
  const int32_t index[] = {0, static_cast<int32_t>(Up(2) == 1 ? 4 + Up(1000) - 1 : -Up(1000))};
  const Array chosen{index, Element::kS32, {2}}, given = F32(x, {2, 3}), matrix = F32(rows, {4, 3});
  auto refused = [](const std::string& wrong) { Expect(!wrong.empty(), "something that does not fit was taken"); };
  const Array none{nullptr, Element::kF32, {0}};
  refused(hire::SelectRowsDot(pool, kernels, given, matrix, none, chosen, 1, false, {out, 4}));
  refused(hire::CombineRows(pool, kernels, F32(x, {3, 2}), matrix, none, chosen, 1, {out, 6}));
  const Array fitting{index, Element::kS32, {1}};
  refused(hire::SelectRowsDot(pool, kernels, F32(x, {3, 2}), matrix, none, fitting, 1, false, {out, 3}));
  refused(hire::SelectRowsDot(pool, kernels, given, matrix, none, fitting, 3, false, {out, 6}));
  refused(hire::SelectRowsDot(pool, kernels, given, matrix, none, fitting, 1, false, {out, 3}));
  refused(hire::SelectRowsDot(pool, kernels, given, matrix, F32(rows, {4, 3}), fitting, 1, false, {out, 2}));
  const int8_t bytes[12] = {};
  const Array narrow{bytes, Element::kS8, {4, 3}};
  refused(hire::SelectRowsDot(pool, kernels, given, narrow, F32(rows, {3, 4}), fitting, 1, false, {out, 2}));
  const Array odd{bytes, Element::kS4, {4, 3}};
  refused(hire::SelectRowsDot(pool, kernels, F32(x, {2, 3}), odd, none, fitting, 1, false, {out, 2}));
  refused(hire::CombineRows(pool, kernels, F32(x, {6, 1}), narrow, F32(rows, {4}), fitting, 1, {out, 6}));
  const int32_t none_below = 0, outside = 1;
  refused(hire::Products(pool, kernels, given, F32(rows, {12}), Number(none_below), 3, {out, 6}));
  refused(hire::Products(pool, kernels, given, matrix, Number(outside), 4, {out, 8}));
  refused(hire::Products(pool, kernels, given, matrix, fitting, 4, {out, 8}));
  refused(hire::ScoreRows(pool, kernels, given, narrow, F32(rows, {4}), Number(outside), 8, 1, {out, 8}, {nullptr, 0}));
  refused(hire::LargestOf(pool, kernels, given, 4, 1, true, {out, 8}, {nullptr, 8}));
  refused(hire::ArgMax(pool, kernels, given, {nullptr, 3}));
  refused(hire::ArgMax(pool, kernels, F32(x, {2, 0}), {nullptr, 2}));
  refused(hire::OpenRows(pool, kernels, given, {nullptr, 6}, {nullptr, 1}));
  refused(hire::OpenRows(pool, kernels, F32(x, {6}), {nullptr, 5}, {nullptr, 1}));
  refused(hire::OpenRows(pool, kernels, F32(x, {6}), {nullptr, 6}, {nullptr, 2}));
  refused(hire::ScoreRows(pool, kernels, given, matrix, F32(rows, {4}), Number(none_below), 8, 1, {out, 6}, {nullptr, 0}));
}

}  // namespace

int main(int argc, char** argv) {
  generator.seed(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0);
  const int64_t count = argc > 2 ? std::atoll(argv[2]) : 100;
  std::vector<const Kernels*> all{&hire::kPortable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    all.push_back(&hire::kAvx2);
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    all.push_back(&hire::kAvx512);
#elif defined(__aarch64__)
  all.push_back(&hire::kNeon);
#endif
  for (int64_t i = 0; i < count; ++i) {
    Threads pool(static_cast<int>(Up(4)));
    const Kernels& kernels = *all[static_cast<size_t>(i) % all.size()];
    FuzzScores(pool, kernels);
    FuzzRows(pool, kernels);
    FuzzLargest(pool, kernels);
    FuzzArgMax(pool, kernels);
    FuzzOpenRows(pool, kernels);
    FuzzRefusals(pool, kernels);
  }
  std::printf("%" PRId64 " rounds on", count);
  for (const Kernels* one : all) std::printf(" %s,", one->name);
  std::printf(" no failure\n");
  return 0;
}
