// The k largest of an array of f32, without sorting it.
#ifndef HIRE_LARGEST_H_
#define HIRE_LARGEST_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

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

constexpr int64_t kScoresABlock = 16384;

// Entries among which the k largest are: those no smaller than a score that a sample says about twice as many reach.
// None where it was wrong, or NaN.
template <typename Pool>
std::vector<uint64_t> AboveSample(Pool& pool, const float* scores, int64_t n, int64_t k) {
  constexpr int64_t kSample = 2048;
  std::vector<uint32_t> sample(kSample);
  for (int64_t i = 0; i < kSample; ++i) sample[static_cast<size_t>(i)] = KeyOf(scores[i * (n / kSample)]);
  const auto rank = sample.begin() + (2 * k * kSample / n + 8);
  std::nth_element(sample.begin(), rank, sample.end(), std::greater<uint32_t>());
  const float least = ValueOf(*rank);
  if (least != least) return {};
  const int64_t blocks = (n + kScoresABlock - 1) / kScoresABlock;
  std::vector<std::vector<uint64_t>> found(static_cast<size_t>(blocks));
  ForEachBlock(pool, blocks, [&](int64_t block) {
    std::vector<uint64_t>& own = found[static_cast<size_t>(block)];
    const int64_t end = std::min(n, (block + 1) * kScoresABlock);
    for (int64_t i = block * kScoresABlock; i < end; ++i)
      if (!(scores[i] < least)) own.push_back(Entry(scores[i], i));  // a NaN is not smaller
  });
  std::vector<uint64_t> all;
  for (const auto& own : found) all.insert(all.end(), own.begin(), own.end());
  if (static_cast<int64_t>(all.size()) < k) all.clear();
  return all;
}

// The same for certain: counts how many scores have each value of their leading bits, which says in which of these bins
// the k-th stands, and takes that one and all above.
template <typename Pool>
std::vector<uint64_t> AboveBins(Pool& pool, const float* scores, int64_t n, int64_t k) {
  constexpr int kShift = 20;
  constexpr int64_t kBins = int64_t{1} << (32 - kShift);
  const int64_t blocks = (n + kScoresABlock - 1) / kScoresABlock;
  std::vector<uint32_t> counts(static_cast<size_t>(blocks * kBins), 0);
  ForEachBlock(pool, blocks, [&](int64_t block) {
    uint32_t* own = counts.data() + block * kBins;
    const int64_t end = std::min(n, (block + 1) * kScoresABlock);
    for (int64_t i = block * kScoresABlock; i < end; ++i) ++own[KeyOf(scores[i]) >> kShift];
  });
  int64_t bin = kBins, taken = 0;
  do {
    --bin;
    for (int64_t block = 0; block < blocks; ++block) taken += counts[static_cast<size_t>(block * kBins + bin)];
  } while (taken < k);
  std::vector<uint64_t> all;
  all.reserve(static_cast<size_t>(taken));
  for (int64_t i = 0; i < n; ++i)
    if (KeyOf(scores[i]) >> kShift >= bin) all.push_back(Entry(scores[i], i));
  return all;
}

// Writes the k largest of scores[0 .. n - 1] and where they stand, from the largest down; ties go to the lower index.
// 1 <= k <= n < 2^31.
template <typename Pool>
void Largest(Pool& pool, const float* scores, int64_t n, int64_t k, int64_t first, float* values, int32_t* indices) {
  std::vector<uint64_t> chosen;
  if (n >= kScoresABlock && k <= n / 16) chosen = AboveSample(pool, scores, n, k);
  if (chosen.empty()) chosen = AboveBins(pool, scores, n, k);
  const auto end = chosen.begin() + k;
  if (end != chosen.end()) std::nth_element(chosen.begin(), end, chosen.end(), std::greater<uint64_t>());
  std::sort(chosen.begin(), end, std::greater<uint64_t>());
  for (int64_t i = 0; i < k; ++i) {
    const uint64_t entry = chosen[static_cast<size_t>(i)];
    values[i] = ValueOf(static_cast<uint32_t>(entry >> 32));
    indices[i] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(entry) + first);
  }
}

}  // namespace hire

#endif  // HIRE_LARGEST_H_
