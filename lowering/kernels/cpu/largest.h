// The k largest of an array of f32, without sorting it.
#ifndef HIRE_LARGEST_H_
#define HIRE_LARGEST_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
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

// Writes the k largest of scores[0 .. n - 1] and where they stand, from the largest down; ties go to the lower index.
//
// Counts how many scores have each value of their leading bits, which says in which of these bins the k-th stands; then
// collects what lies above, and of that one bin the largest. 1 <= k <= n < 2^32.
template <typename Pool>
void Largest(Pool& pool, const float* scores, int64_t n, int64_t k, int64_t first, float* values, int32_t* indices) {
  constexpr int kShift = 20;
  constexpr int64_t kBins = int64_t{1} << (32 - kShift), kBlock = 16384;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<uint32_t> counts(static_cast<size_t>(blocks * kBins), 0);
  auto end_of = [&](int64_t block) { return std::min(n, (block + 1) * kBlock); };
  ForEachBlock(pool, blocks, [&](int64_t block) {
    uint32_t* own = counts.data() + block * kBins;
    for (int64_t i = block * kBlock; i < end_of(block); ++i) ++own[KeyOf(scores[i]) >> kShift];
  });
  int64_t bin = kBins, above = 0, inside = 0;
  do {
    above += inside;
    --bin;
    inside = 0;
    for (int64_t block = 0; block < blocks; ++block) inside += counts[block * kBins + bin];
  } while (above + inside < k);
  // Both as one number: the larger value, then the lower index, is the larger number.
  auto entry = [](uint32_t key, int64_t i) { return (uint64_t{key} << 32) | (0xffffffffu - static_cast<uint32_t>(i)); };
  std::vector<uint64_t> chosen, edge;
  chosen.reserve(static_cast<size_t>(k));
  edge.reserve(static_cast<size_t>(inside));
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = KeyOf(scores[i]);
    if ((key >> kShift) < bin) continue;
    ((key >> kShift) > bin ? chosen : edge).push_back(entry(key, i));
  }
  const auto needed = edge.begin() + (k - above);
  if (needed != edge.end()) std::nth_element(edge.begin(), needed, edge.end(), std::greater<uint64_t>());
  chosen.insert(chosen.end(), edge.begin(), needed);
  std::sort(chosen.begin(), chosen.end(), std::greater<uint64_t>());
  for (int64_t i = 0; i < k; ++i) {
    values[i] = ValueOf(static_cast<uint32_t>(chosen[i] >> 32));
    indices[i] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(chosen[i]) + first);
  }
}

}  // namespace hire

#endif  // HIRE_LARGEST_H_
