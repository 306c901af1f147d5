// The k largest of an array of f32, without sorting it.
#ifndef HIRE_LARGEST_H_
#define HIRE_LARGEST_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace hire {

// Ascending with the value, in IEEE's total order, but every NaN on top.
inline uint32_t KeyOf(float value) {
  if (value != value) return 0xffffffffu;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float ValueOf(uint32_t key) {
  if (key == 0xffffffffu) return std::numeric_limits<float>::quiet_NaN();
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A score and where it stands as one number: the larger value, then the lower index, is the larger number.
inline uint64_t Entry(float score, int64_t i) {
  return (uint64_t{KeyOf(score)} << 32) | (0xffffffffu - static_cast<uint32_t>(i));
}

inline uint32_t KeyIn(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }

constexpr int64_t kScoresABlock = 16384;
// Of fewer scores no sample is taken.
constexpr int64_t kLeastSampled = 1024;

// Entries of all scores that are not smaller than `least`, in the order of their index; a NaN is not smaller.
template <typename Pool>
std::vector<uint64_t> NotBelow(Pool& pool, const Kernels& kernels, const float* scores, int64_t n, float least) {
  const int64_t blocks = (n + kScoresABlock - 1) / kScoresABlock;
  // Not filled with zeros, which would take as long as the rest.
  std::unique_ptr<uint64_t[]> found(new uint64_t[static_cast<size_t>(n)]);
  std::vector<int64_t> counts(static_cast<size_t>(blocks));
  ForEachBlock(pool, blocks, [&](int64_t block) {
    const int64_t begin = block * kScoresABlock, size = std::min(n - begin, kScoresABlock);
    int32_t own[kScoresABlock];
    const int64_t count = kernels.not_below(scores + begin, size, least, own);
    for (int64_t i = 0; i < count; ++i) found[begin + i] = Entry(scores[begin + own[i]], begin + own[i]);
    counts[static_cast<size_t>(block)] = count;
  });
  std::vector<uint64_t> all;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint64_t* own = found.get() + block * kScoresABlock;
    all.insert(all.end(), own, own + counts[static_cast<size_t>(block)]);
  }
  return all;
}

// A score that all of the k largest, and few more, probably reach, going by a sample. NaN where one is among the largest.
inline float LeastBySample(const float* scores, int64_t n, int64_t k) {
  const int64_t size = std::min<int64_t>(2048, std::max<int64_t>(256, n / 16)), every = n / size;
  std::vector<uint32_t> sample(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) sample[static_cast<size_t>(i)] = KeyOf(scores[i * every]);
  // Where the k-th largest would stand among them, and three standard deviations further down.
  const double expected = static_cast<double>(k) * static_cast<double>(size) / static_cast<double>(n);
  const auto rank = std::min(size - 1, static_cast<int64_t>(expected + 3.0 * std::sqrt(expected)) + 2);
  std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<uint32_t>());
  return ValueOf(sample[static_cast<size_t>(rank)]);
}

// A number above `value` with none between them, going by a processor that takes denormals for zeros.
inline float NextAbove(float value) {
  constexpr float kNormal = std::numeric_limits<float>::min();
  return std::fabs(value) < kNormal ? kNormal : ValueOf(KeyOf(value) + 1);
}

// Where the k largest are those above `least`, which `chosen` holds, and some of those that equal it, such as the zeros of
// a ReLU: adds the first of these; whether that is so.
inline bool FillWithEqual(const float* scores, int64_t n, int64_t k, float least, float above,
                          std::vector<uint64_t>& chosen) {
  const uint32_t key = KeyOf(least), between = KeyOf(above) - key - 1;
  if (between > 0) {
    bool odd = false;
    for (int64_t i = 0; i < n; ++i) odd |= KeyOf(scores[i]) - key - 1 < between;
    if (odd) return false;
  }
  for (int64_t i = 0; i < n && static_cast<int64_t>(chosen.size()) < k; ++i)
    if (KeyOf(scores[i]) == key) chosen.push_back(Entry(scores[i], i));
  return static_cast<int64_t>(chosen.size()) == k;
}

// The least score of the bin in which the k-th largest stands: scores are counted by the leading bits of their keys.
template <typename Pool>
float LeastByBins(Pool& pool, const float* scores, int64_t n, int64_t k) {
  constexpr int kShift = 20, kTables = 4;
  constexpr int64_t kBins = int64_t{1} << (32 - kShift);
  const int64_t blocks = (n + kScoresABlock - 1) / kScoresABlock;
  // Several tables, since equal scores would wait for each other's count.
  std::vector<uint32_t> counts(static_cast<size_t>(blocks * kTables * kBins), 0);
  ForEachBlock(pool, blocks, [&](int64_t block) {
    uint32_t* own = counts.data() + block * kTables * kBins;
    const int64_t end = std::min(n, (block + 1) * kScoresABlock);
    for (int64_t i = block * kScoresABlock; i < end; ++i) ++own[i % kTables * kBins + (KeyOf(scores[i]) >> kShift)];
  });
  int64_t bin = kBins, taken = 0;
  do {
    --bin;
    for (int64_t table = 0; table < blocks * kTables; ++table)
      taken += counts[static_cast<size_t>(table * kBins + bin)];
  } while (taken < k);
  // The key of the bin's least score. That of the topmost bin may be a NaN's, which every score is taken with.
  return ValueOf(static_cast<uint32_t>(bin) << kShift);
}

// Sorts by key from the largest down, and leaves equal keys in the order they are in: a digit of 8 bits at a time.
inline void SortByKey(std::vector<uint64_t>& entries) {
  if (entries.size() < 128) {
    std::stable_sort(entries.begin(), entries.end(), [](uint64_t a, uint64_t b) { return KeyIn(a) > KeyIn(b); });
    return;
  }
  std::vector<uint64_t> other(entries.size());
  uint32_t counts[4][256] = {};
  for (uint64_t entry : entries)
    for (int digit = 0; digit < 4; ++digit) ++counts[digit][~(KeyIn(entry) >> (8 * digit)) & 0xff];
  for (int digit = 0; digit < 4; ++digit) {
    auto place = [&](uint64_t entry) { return ~(KeyIn(entry) >> (8 * digit)) & 0xff; };
    if (counts[digit][place(entries[0])] == entries.size()) continue;
    uint32_t begin = 0;
    for (uint32_t& count : counts[digit]) {
      const uint32_t own = count;
      count = begin;
      begin += own;
    }
    for (uint64_t entry : entries) other[counts[digit][place(entry)]++] = entry;
    entries.swap(other);
  }
}

// Writes the k largest of scores[0 .. n - 1] and where they stand, from the largest down or, if not `ordered`, in any
// order; ties go to the lower index. 1 <= k <= n < 2^31.
template <typename Pool>
void Largest(Pool& pool, const Kernels& kernels, const float* scores, int64_t n, int64_t k, int64_t first, bool ordered,
             float* values, int32_t* indices) {
  std::vector<uint64_t> chosen;
  auto enough = [&] { return static_cast<int64_t>(chosen.size()) >= k; };
  if (n >= kLeastSampled && k <= n / 4) {
    const float least = LeastBySample(scores, n, k);
    if (least == least) {
      const float above = NextAbove(least);
      chosen = NotBelow(pool, kernels, scores, n, above);
      if (!enough()) FillWithEqual(scores, n, k, least, above, chosen);
    }
  }
  if (!enough()) chosen = NotBelow(pool, kernels, scores, n, LeastByBins(pool, scores, n, k));
  // To sort a few too many costs less than to tell them from the others.
  const int64_t found = static_cast<int64_t>(chosen.size());
  if (found > (ordered ? 2 * k : k)) {
    std::vector<uint64_t> ranked(chosen);
    std::nth_element(ranked.begin(), ranked.begin() + (k - 1), ranked.end(), std::greater<uint64_t>());
    const uint64_t last = ranked[static_cast<size_t>(k - 1)];
    chosen.erase(std::remove_if(chosen.begin(), chosen.end(), [=](uint64_t entry) { return entry < last; }),
                 chosen.end());
  }
  if (ordered) SortByKey(chosen);
  for (int64_t i = 0; i < k; ++i) {
    const uint64_t entry = chosen[static_cast<size_t>(i)];
    values[i] = ValueOf(KeyIn(entry));
    indices[i] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(entry) + first);
  }
}

}  // namespace hire

#endif  // HIRE_LARGEST_H_
