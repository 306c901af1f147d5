// The inner loops in terms of a few vector operations. Included by one file for each instruction set, inside a namespace
// of its own, behind the operations:
//
//   F, kLanes, kRegisters       a vector of f32, how many entries it has, and how many there may be at a time
//   Zero, Load, LoadBF16, LoadF16, LoadE4M3, LoadE5M2, LoadS8, LoadS4, Store, Fma(a, b, c) = a b + c, Abs, Broadcast, Sum
//   Max, NaNs(a, b)             where neither is NaN, the larger; a, with those entries of b that are NaN
//   NotBelow(a, b)              whether an entry of a is not smaller than that of b, as a NaN is not
//   Places(a, b, first, out)    writes which entries these are, counted from `first`, and anything behind them, kLanes
//                               numbers in all at most; how many they are
//   I, kBytes                   a vector of int32 that products of kBytes pairs of bytes are added to
//   Bytes, LoadBytes, ZeroI, SumI
//   SumFour(sums, out)          adds the sums of four to four numbers
//   DotS8(sum, row, token)      row int8 or, where kOffset8 is not zero, what is in it plus that
//   DotU8(sum, row, token)      row entries 0 .. 15
//   Biased(row), Low(row), High(row)   a row of int8 plus kOffset8; nibbles plus 8
//
// No function of the standard library is called: the compiler would make it for this instruction set, and the linker
// might take that one for all.

// Rows of one block that are read together, so that their sums are folded together and the tokens are read once. Long
// rows of one token, or one and what it lost, are read one after the other, in the order in which memory has them.
constexpr int kRowsTogether = 4;
constexpr int64_t kLongRow = 256;
// How far ahead of itself a row is fetched, at least: what comes from memory while this much is multiplied.
constexpr int64_t kAhead = 4096;
// Integer sums of up to this many entries fit into 32 bits with every offset.
constexpr int64_t kExact = 65536;

template <int R, int T, int Bits>
inline void IntegerBlock(const Scores& s, const uint8_t* rows, const int8_t* const* tokens, int32_t (*out)[R]) {
  const int64_t bytes = s.row_bytes, ahead = R * bytes < kAhead ? kAhead : R * bytes;
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) out[t][r] = 0;
  for (int64_t begin = 0; begin < bytes; begin += kExact) {
    const int64_t end = bytes - begin < kExact ? bytes : begin + kExact;
    I sum[T][R];
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) sum[t][r] = ZeroI();
    int64_t j = begin;
    auto step = [&](const Bytes (&row)[R]) {
      for (int t = 0; t < T; ++t) {
        const Bytes x = LoadBytes(tokens[t] + j);
        if constexpr (Bits == 8) {
          for (int r = 0; r < R; ++r) sum[t][r] = DotS8(sum[t][r], row[r], x);
        } else {
          const Bytes y = LoadBytes(tokens[t] + s.half_stride + j);
          for (int r = 0; r < R; ++r) sum[t][r] = DotU8(DotU8(sum[t][r], Low(row[r]), x), High(row[r]), y);
        }
      }
    };
    auto prepared = [&](const uint8_t* p) {
      const Bytes row = LoadBytes(p);
      return Bits == 8 ? Biased(row) : row;
    };
    for (; j + kBytes <= end; j += kBytes) {
      Bytes row[R];
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(rows + r * bytes + j + ahead);
        row[r] = prepared(rows + r * bytes + j);
      }
      step(row);
    }
    if (j < end) {
      // What lies behind a row is another's, and nobody's behind the last; the token's zeros there cancel it.
      const bool inside = s.end - (rows + (R - 1) * bytes + j) >= kBytes;
      Bytes row[R];
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = rows + r * bytes + j;
        alignas(64) uint8_t part[kBytes];
        if (!inside) {
          for (int64_t i = 0; i < kBytes; ++i) part[i] = i < end - j ? p[i] : 0;
          p = part;
        }
        row[r] = prepared(p);
      }
      step(row);
    }
    for (int t = 0; t < T; ++t) {
      if constexpr (R == 4)
        SumFour(sum[t], out[t]);
      else
        for (int r = 0; r < R; ++r) out[t][r] += SumI(sum[t][r]);
    }
  }
}

// The largest magnitude of n numbers, or NaN where one is not finite.
inline float PeakOf(const float* x, int64_t n) {
  F most = Zero(), odd = Zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F v = Load(x + i);
    most = Max(most, Abs(v));
    // Zero times what is not finite is NaN.
    odd = Fma(v, Zero(), odd);
  }
  float lanes[kLanes], peak = 0.0f, sum = Sum(odd);
  Store(lanes, most);
  for (int k = 0; k < kLanes; ++k) peak = lanes[k] > peak ? lanes[k] : peak;
  for (; i < n; ++i) {
    const float size = __builtin_fabsf(x[i]);
    sum += 0.0f * x[i];
    peak = size > peak ? size : peak;
  }
  return peak + sum;
}

// Adding and subtracting this rounds a number of up to 2^22 to the nearest integer, ties to even.
constexpr float kRound = 12582912.0f;

inline int8_t InByte(float value) {
  const float rounded = (value + kRound) - kRound;
  const float least = rounded < -127.0f ? -127.0f : rounded;
  return static_cast<int8_t>(static_cast<int32_t>(least > 127.0f ? 127.0f : least));
}

// One token in integers of 8 bits and a scale, as `quantize` in lowering/predict has it: all zero and of scale NaN where
// an entry is not finite, and of scale zero where all are. With `second`, what the first 8 bits lost in steps of 1/254 of
// the scale, and in `kept` what both keep.
inline float QuantizeAll(const float* x, int64_t n, int8_t* first, int8_t* second, float* kept) {
  const float scale = PeakOf(x, n) / 127.0f;
  const bool usable = scale > 0.0f;
  for (int64_t i = 0; i < n; ++i) first[i] = usable ? InByte(x[i] / scale) : int8_t{0};
  if (second) {
    for (int64_t i = 0; i < n; ++i) {
      const float one = static_cast<float>(first[i]);
      const int8_t rest = usable ? InByte((x[i] - one * scale) / scale * 254.0f) : int8_t{0};
      second[i] = rest;
      kept[i] = (one + static_cast<float>(rest) / 254.0f) * scale;
    }
  }
  return scale;
}

inline int32_t SumOf(const int8_t* q, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += q[i];
  return sum;
}

// Integer products of R rows with all tokens, a few tokens at a time.
template <int R, int Bits>
inline void IntegerRows(const Scores& s, const uint8_t* rows, int32_t* raw, int64_t raw_stride) {
  constexpr int32_t offset = Bits == 8 ? kOffset8 : 8;
  int t = 0;
  auto some = [&](auto width) {
    constexpr int T = decltype(width)::value;
    const int8_t* tokens[T];
    for (int i = 0; i < T; ++i) tokens[i] = s.tokens + (t + i) * s.token_stride;
    int32_t sums[T][R];
    IntegerBlock<R, T, Bits>(s, rows, tokens, sums);
    for (int i = 0; i < T; ++i)
      for (int r = 0; r < R; ++r) raw[(t + i) * raw_stride + r] = sums[i][r] - offset * s.sums[t + i];
    t += T;
  };
  while (s.count - t >= 4) some(Width<4>());
  if (s.count - t >= 2) some(Width<2>());
  if (s.count - t >= 1) some(Width<1>());
}

constexpr int64_t kRowsABlock = 64;

template <int Bits>
inline void ScoresOf(const Scores& s, int64_t first, int64_t last) {
  int32_t raw[kMostTokens * kRowsABlock];
  const int64_t tokens = s.count / s.limbs;
  for (int64_t begin = first; begin < last; begin += kRowsABlock) {
    const int64_t rows = last - begin < kRowsABlock ? last - begin : kRowsABlock;
    const bool alone = s.count <= (Bits == 8 ? 2 : 1) && s.row_bytes >= kLongRow;
    int64_t r = 0;
    for (; !alone && r + kRowsTogether <= rows; r += kRowsTogether)
      IntegerRows<kRowsTogether, Bits>(s, s.rows + (begin + r) * s.row_bytes, raw + r, kRowsABlock);
    for (; r < rows; ++r) IntegerRows<1, Bits>(s, s.rows + (begin + r) * s.row_bytes, raw + r, kRowsABlock);
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t* one = raw + t * kRowsABlock;
      const int32_t* rest = raw + (tokens + t) * kRowsABlock;
      const float step = s.token_scale[t];
      float* out = s.out + t * s.n + begin;
      const float* scale = s.row_scale + begin;
      if (s.limbs == 1)
        for (int64_t i = 0; i < rows; ++i) out[i] = static_cast<float>(one[i]) * step * scale[i];
      else
        for (int64_t i = 0; i < rows; ++i)
          out[i] = (static_cast<float>(one[i]) + static_cast<float>(rest[i]) / 254.0f) * step * scale[i];
    }
  }
}

inline void ScoresAll(const Scores& s, int64_t first, int64_t last) {
  if (s.bits == 8)
    ScoresOf<8>(s, first, last);
  else
    ScoresOf<4>(s, first, last);
}

template <RowType Type>
inline F LoadRow(const uint8_t* p) {
  if constexpr (Type == RowType::kF32) return Load(reinterpret_cast<const float*>(p));
  if constexpr (Type == RowType::kBF16) return LoadBF16(reinterpret_cast<const uint16_t*>(p));
  if constexpr (Type == RowType::kF16) return LoadF16(reinterpret_cast<const uint16_t*>(p));
  if constexpr (Type == RowType::kE4M3) return LoadE4M3(p);
  if constexpr (Type == RowType::kE5M2) return LoadE5M2(p);
  if constexpr (Type == RowType::kS8) return LoadS8(reinterpret_cast<const int8_t*>(p));
  if constexpr (Type == RowType::kS4) return LoadS4(p);
}

template <RowType Type>
inline F LoadRowPart(const uint8_t* p, int64_t count) {
  alignas(64) uint8_t part[BytesOf(Type, kLanes)] = {};
  for (int64_t i = 0; i < BytesOf(Type, count); ++i) part[i] = p[i];
  return LoadRow<Type>(part);
}

inline F LoadPart(const float* p, int64_t count) {
  return LoadRowPart<RowType::kF32>(reinterpret_cast<const uint8_t*>(p), count);
}

// How the entries of a row become numbers: as they are, or times what a scale has for their columns.
enum class Scaling { kNone, kColumns, kBlocks };

inline const float* ScaleOf(const Scale& scale, int64_t d, int64_t row) {
  return scale.values ? scale.values + row / scale.rows * (d / scale.columns) : nullptr;
}

template <RowType Type, Scaling Scaled>
inline F LoadScaled(const uint8_t* row, const float* scale, int64_t columns, int64_t j) {
  const F w = LoadRow<Type>(row + BytesOf(Type, j));
  if constexpr (Scaled == Scaling::kColumns) return Fma(w, Load(scale + j), Zero());
  if constexpr (Scaled == Scaling::kBlocks) return Fma(w, Broadcast(scale[j / columns]), Zero());
  return w;
}

template <RowType Type, Scaling Scaled>
inline F LoadScaledPart(const uint8_t* row, const float* scale, int64_t columns, int64_t j, int64_t count) {
  const F w = LoadRowPart<Type>(row + BytesOf(Type, j), count);
  if constexpr (Scaled == Scaling::kColumns) return Fma(w, LoadPart(scale + j, count), Zero());
  if constexpr (Scaled == Scaling::kBlocks) return Fma(w, Broadcast(scale[j / columns]), Zero());
  return w;
}

// Calls fun(width of a scaling) for that of a scale; only rows of int8 and int4 have one.
template <RowType Type, typename Fun>
inline void WithScaling(const Scale& scale, const Fun& fun) {
  if constexpr (Type == RowType::kS8 || Type == RowType::kS4) {
    if (scale.values && scale.columns == 1) return fun(Width<static_cast<int>(Scaling::kColumns)>());
    if (scale.values) return fun(Width<static_cast<int>(Scaling::kBlocks)>());
  }
  fun(Width<static_cast<int>(Scaling::kNone)>());
}

// R chosen rows, those that are fetched while these are used, and the scales of these.
template <int R>
struct SomeRows {
  const uint8_t *rows[R], *ahead[R];
  const float* scales[R];

  // Rows i .. i + R - 1 of the `end` rows that are chosen; `number` says which they are.
  template <typename Step, typename Number>
  SomeRows(const Step& s, const Number& number, int64_t i, int64_t end) {
    const int64_t row_bytes = BytesOf(s.type, s.d), least = kAhead / (row_bytes + 1) + 1, on = least < R ? R : least;
    for (int r = 0; r < R; ++r) {
      rows[r] = s.rows + number(i + r) * row_bytes;
      ahead[r] = i + r + on < end ? s.rows + number(i + r + on) * row_bytes : rows[r];
      scales[r] = ScaleOf(s.scale, s.d, number(i + r));
    }
  }
};

// R rows with T tokens.
template <RowType Type, int R, int T, bool Magnitudes, Scaling Scaled>
inline void DotRows(const Dots& s, const SomeRows<R>& here, const float* x, float* out) {
  const auto& [rows, ahead, scales] = here;
  // As many sums at a time as hide how long an addition takes.
  constexpr int kSums = T == 1 ? 4 : T == 2 ? 2 : 1;
  F sum[R][T][kSums];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      for (int k = 0; k < kSums; ++k) sum[r][t][k] = Zero();
  int64_t j = 0;
  for (; j + kSums * kLanes <= s.d; j += kSums * kLanes) {
    for (int r = 0; r < R; ++r)
      for (int64_t b = 0; b < BytesOf(Type, kSums * kLanes); b += 64) __builtin_prefetch(ahead[r] + BytesOf(Type, j) + b);
    for (int k = 0; k < kSums; ++k) {
      F w[R];
      for (int r = 0; r < R; ++r) {
        w[r] = LoadScaled<Type, Scaled>(rows[r], scales[r], s.scale.columns, j + k * kLanes);
        if (Magnitudes) w[r] = Abs(w[r]);
      }
      for (int t = 0; t < T; ++t) {
        const F token = Load(x + t * s.d + j + k * kLanes);
        for (int r = 0; r < R; ++r) sum[r][t][k] = Fma(w[r], token, sum[r][t][k]);
      }
    }
  }
  for (; j < s.d; j += kLanes) {
    const int64_t left = s.d - j;
    for (int r = 0; r < R; ++r) {
      F w = left < kLanes ? LoadScaledPart<Type, Scaled>(rows[r], scales[r], s.scale.columns, j, left)
                          : LoadScaled<Type, Scaled>(rows[r], scales[r], s.scale.columns, j);
      if (Magnitudes) w = Abs(w);
      for (int t = 0; t < T; ++t) {
        const float* at = x + t * s.d + j;
        sum[r][t][0] = Fma(w, left < kLanes ? LoadPart(at, left) : Load(at), sum[r][t][0]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      for (int k = kSums / 2; k > 0; k /= 2)
        for (int i = 0; i < k; ++i) sum[r][t][i] = Add(sum[r][t][i], sum[r][t][i + k]);
      out[t * s.stride + r] = Sum(sum[r][t][0]);
    }
}

template <RowType Type, bool Magnitudes, Scaling Scaled>
inline void DotsOf(const Dots& s, int64_t first, int64_t last) {
  auto number = [&](int64_t i) {
    const int64_t entry = i / s.group;
    return (s.index ? s.index[entry] : entry) * s.group + i % s.group;
  };
  const int64_t end = last * s.group;
  int64_t i = first * s.group;
  auto some_rows = [&](auto height) {
    constexpr int R = decltype(height)::value;
    const SomeRows<R> here(s, number, i, end);
    int64_t t = 0;
    auto some_tokens = [&](auto width) {
      constexpr int T = decltype(width)::value;
      DotRows<Type, R, T, Magnitudes, Scaled>(s, here, s.x + t * s.d, s.out + t * s.stride + i);
      t += T;
    };
    while (t + 4 <= s.tokens) some_tokens(Width<4>());
    while (t + 2 <= s.tokens) some_tokens(Width<2>());
    while (t < s.tokens) some_tokens(Width<1>());
    i += R;
  };
  // Rows of several tokens are taken two at a time, so that each token's numbers are read half as often.
  while (s.tokens >= 4 && i + 2 <= end) some_rows(Width<2>());
  while (i < end) some_rows(Width<1>());
}

template <RowType Type>
inline void DotsOf(const Dots& s, int64_t first, int64_t last) {
  WithScaling<Type>(s.scale, [&](auto scaling) {
    constexpr auto Scaled = static_cast<Scaling>(decltype(scaling)::value);
    if (s.magnitudes)
      DotsOf<Type, true, Scaled>(s, first, last);
    else
      DotsOf<Type, false, Scaled>(s, first, last);
  });
}

inline void DotsAll(const Dots& s, int64_t first, int64_t last) {
  switch (s.type) {
    case RowType::kF32: return DotsOf<RowType::kF32>(s, first, last);
    case RowType::kBF16: return DotsOf<RowType::kBF16>(s, first, last);
    case RowType::kF16: return DotsOf<RowType::kF16>(s, first, last);
    case RowType::kE4M3: return DotsOf<RowType::kE4M3>(s, first, last);
    case RowType::kE5M2: return DotsOf<RowType::kE5M2>(s, first, last);
    case RowType::kS8: return DotsOf<RowType::kS8>(s, first, last);
    case RowType::kS4: return DotsOf<RowType::kS4>(s, first, last);
  }
}

// Adds R rows, each times its token's number, to `total`.
template <RowType Type, int R, Scaling Scaled>
inline void AddRows(const Sums& s, const SomeRows<R>& here, int64_t i, float* total) {
  const auto& [rows, ahead, scales] = here;
  int64_t j = 0;
  for (; j + kLanes <= s.d; j += kLanes) {
    F row[R];
    for (int r = 0; r < R; ++r) {
      if (BytesOf(Type, j) % 64 == 0) __builtin_prefetch(ahead[r] + BytesOf(Type, j));
      row[r] = LoadScaled<Type, Scaled>(rows[r], scales[r], s.scale.columns, j);
    }
    for (int64_t t = 0; t < s.tokens; ++t) {
      F sum = Load(total + t * s.d + j);
      for (int r = 0; r < R; ++r) sum = Fma(Broadcast(s.h[t * s.stride + i + r]), row[r], sum);
      Store(total + t * s.d + j, sum);
    }
  }
  if (j < s.d) {
    F row[R];
    for (int r = 0; r < R; ++r)
      row[r] = LoadScaledPart<Type, Scaled>(rows[r], scales[r], s.scale.columns, j, s.d - j);
    for (int64_t t = 0; t < s.tokens; ++t) {
      F sum = LoadPart(total + t * s.d + j, s.d - j);
      for (int r = 0; r < R; ++r) sum = Fma(Broadcast(s.h[t * s.stride + i + r]), row[r], sum);
      alignas(64) float part[kLanes];
      Store(part, sum);
      for (int64_t k = 0; k < s.d - j; ++k) total[t * s.d + j + k] = part[k];
    }
  }
}

// Columns of one token's sums that stay in registers while the rows go by, in vectors, and the bytes of a row that are at
// least to be read at once: of fewer memory is slow.
constexpr int kSumsTogether = kRegisters / 2;
constexpr int64_t kLeastPiece = 1024;

// Some rows of a sum: where they and their scales begin.
struct RowBlock {
  const uint8_t* rows[kRowsABlock];
  const float* scales[kRowsABlock];
  int64_t count;
};

// Adds rows, each times its number in `h`, to V vectors of columns of `total` from number j on.
template <RowType Type, int V, Scaling Scaled>
inline void AddColumns(const Sums& s, const RowBlock& block, const float* h, int64_t j, float* total) {
  const int64_t row_bytes = BytesOf(Type, s.d), bytes = BytesOf(Type, V * kLanes), left = s.d - j;
  const bool whole = V > 1 || left >= kLanes;
  F sum[V];
  for (int v = 0; v < V; ++v) sum[v] = whole ? Load(total + j + v * kLanes) : LoadPart(total + j, left);
  // What is fetched lies so many rows on; behind the last row come the first ones' next columns.
  const int64_t rows_on = kAhead / bytes;
  int64_t next = rows_on % block.count, at = BytesOf(Type, j) + rows_on / block.count * bytes;
  for (int64_t r = 0; r < block.count; ++r) {
    if (at < row_bytes)
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(block.rows[next] + at + b);
    if (++next == block.count) {
      next = 0;
      at += bytes;
    }
    const F number = Broadcast(h[r]);
    for (int v = 0; v < V; ++v)
      sum[v] = Fma(number,
                   whole ? LoadScaled<Type, Scaled>(block.rows[r], block.scales[r], s.scale.columns, j + v * kLanes)
                         : LoadScaledPart<Type, Scaled>(block.rows[r], block.scales[r], s.scale.columns, j, left),
                   sum[v]);
  }
  for (int v = 0; whole && v < V; ++v) Store(total + j + v * kLanes, sum[v]);
  if (!whole) {
    alignas(64) float part[kLanes];
    Store(part, sum[0]);
    for (int64_t i = 0; i < left; ++i) total[j + i] = part[i];
  }
}

// Sums of one token: some rows at a time, and of these some columns.
template <RowType Type, Scaling Scaled, typename Number>
inline void SumsOfOne(const Sums& s, const Number& number, int64_t begin, int64_t end, float* total) {
  RowBlock block;
  for (int64_t i = begin; i < end; i += block.count) {
    block.count = end - i < kRowsABlock ? end - i : kRowsABlock;
    for (int64_t r = 0; r < block.count; ++r) {
      block.rows[r] = s.rows + number(i + r) * BytesOf(Type, s.d);
      block.scales[r] = ScaleOf(s.scale, s.d, number(i + r));
    }
    int64_t j = 0;
    for (; j + kSumsTogether * kLanes <= s.d; j += kSumsTogether * kLanes)
      AddColumns<Type, kSumsTogether, Scaled>(s, block, s.h + i, j, total);
    for (; j < s.d; j += kLanes) AddColumns<Type, 1, Scaled>(s, block, s.h + i, j, total);
  }
}

template <RowType Type, Scaling Scaled>
inline void SumsOf(const Sums& s, int64_t first, int64_t last, float* total) {
  auto number = [&](int64_t i) { return s.index[i / s.group] * s.group + i % s.group; };
  for (int64_t j = 0; j < s.tokens * s.d; ++j) total[j] = 0.0f;
  const int64_t end = last * s.group;
  int64_t i = first * s.group;
  if constexpr (BytesOf(Type, kSumsTogether * kLanes) >= kLeastPiece)
    if (s.tokens == 1) return SumsOfOne<Type, Scaled>(s, number, i, end, total);
  auto some = [&](auto width) {
    constexpr int R = decltype(width)::value;
    const SomeRows<R> here(s, number, i, end);
    AddRows<Type, R, Scaled>(s, here, i, total);
    i += R;
  };
  // The sums of many tokens do not lie in the first cache, and short rows are soon at an end: more are added at a time.
  constexpr bool kShort = Type == RowType::kS8 || Type == RowType::kS4;
  while ((s.tokens >= 4 || kShort) && i + 2 * kRowsTogether <= end) some(Width<2 * kRowsTogether>());
  while (i + kRowsTogether <= end) some(Width<kRowsTogether>());
  while (i < end) some(Width<1>());
}

template <RowType Type>
inline void SumsOf(const Sums& s, int64_t first, int64_t last, float* total) {
  WithScaling<Type>(s.scale, [&](auto scaling) {
    SumsOf<Type, static_cast<Scaling>(decltype(scaling)::value)>(s, first, last, total);
  });
}

inline void SumsAll(const Sums& s, int64_t first, int64_t last, float* total) {
  switch (s.type) {
    case RowType::kF32: return SumsOf<RowType::kF32>(s, first, last, total);
    case RowType::kBF16: return SumsOf<RowType::kBF16>(s, first, last, total);
    case RowType::kF16: return SumsOf<RowType::kF16>(s, first, last, total);
    case RowType::kE4M3: return SumsOf<RowType::kE4M3>(s, first, last, total);
    case RowType::kE5M2: return SumsOf<RowType::kE5M2>(s, first, last, total);
    case RowType::kS8: return SumsOf<RowType::kS8>(s, first, last, total);
    case RowType::kS4: return SumsOf<RowType::kS4>(s, first, last, total);
  }
}

// Entries of a stretch: the largest is looked for in all of them, and its place only in one.
constexpr int64_t kStretch = 1024;

inline int64_t ArgMaxAll(const float* values, int64_t n) {
  float best = values[0];
  int64_t in = 0;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    const int64_t end = n - begin < kStretch ? n : begin + kStretch;
    F most = Broadcast(best), nans = Zero();
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      const F v = Load(values + j);
      most = Max(most, v);
      nans = NaNs(nans, v);
    }
    float lanes[kLanes], found = best, odd = Sum(nans);
    Store(lanes, most);
    for (int k = 0; k < kLanes; ++k) found = lanes[k] > found ? lanes[k] : found;
    for (; j < end; ++j) {
      found = values[j] > found ? values[j] : found;
      odd = values[j] != values[j] ? values[j] : odd;
    }
    if (odd != odd) {
      for (j = begin; values[j] == values[j];) ++j;
      return j;
    }
    if (found > best) {
      best = found;
      in = begin;
    }
  }
  while (values[in] != best) ++in;
  return in;
}

inline int64_t NotBelowAll(const float* values, int64_t n, float least, int32_t* out) {
  constexpr int kTogether = 2;
  const F floor = Broadcast(least);
  int64_t count = 0, j = 0;
  // Where few are taken, most are passed over together.
  for (; j + kTogether * kLanes <= n; j += kTogether * kLanes) {
    bool any = false;
    for (int k = 0; k < kTogether; ++k) any |= NotBelow(Load(values + j + k * kLanes), floor);
    if (any)
      for (int k = 0; k < kTogether; ++k)
        count += Places(Load(values + j + k * kLanes), floor, static_cast<int32_t>(j + k * kLanes), out + count);
  }
  for (; j < n; ++j) {
    out[count] = static_cast<int32_t>(j);
    count += !(values[j] < least);
  }
  return count;
}
