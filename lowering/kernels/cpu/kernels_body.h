// The inner loops in terms of a few vector operations. Included by one file for each instruction set, inside a namespace
// of its own, behind the operations:
//
//   F, kLanes                   a vector of f32
//   Zero, Load, LoadBF16, LoadF16, LoadE4M3, LoadE5M2, LoadS8, LoadS4, Store, Fma(a, b, c) = a b + c, Abs, Broadcast, Sum
//   Max, NaNs(a, b)             where neither is NaN, the larger; a, with those entries of b that are NaN
//   NotBelow(a, b)              whether an entry of a is not smaller than that of b, as a NaN is not
//   I, kBytes                   a vector of int32 that products of kBytes pairs of bytes are added to
//   Bytes, LoadBytes, ZeroI, SumI
//   SumFour(sums, out)          adds the sums of four to four numbers
//   DotS8(sum, row, token)      row int8 or, where kOffset8 is not zero, what is in it plus that
//   DotU8(sum, row, token)      row entries 0 .. 15
//   Biased(row), Low(row), High(row)   a row of int8 plus kOffset8; nibbles plus 8
//
// No function of the standard library is called: the compiler would make it for this instruction set, and the linker
// might take that one for all.

// Rows of one block that are read together, so that their sums are folded together and the token is read once.
constexpr int kRowsTogether = 4;
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
    int64_t r = 0;
    for (; r + kRowsTogether <= rows; r += kRowsTogether)
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
    const int64_t row_bytes = BytesOf(s.type, s.d);
    for (int r = 0; r < R; ++r) {
      rows[r] = s.rows + number(i + r) * row_bytes;
      ahead[r] = i + r + R < end ? s.rows + number(i + r + R) * row_bytes : rows[r];
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

template <RowType Type, Scaling Scaled>
inline void SumsOf(const Sums& s, int64_t first, int64_t last, float* total) {
  auto number = [&](int64_t i) { return s.index[i / s.group] * s.group + i % s.group; };
  for (int64_t j = 0; j < s.tokens * s.d; ++j) total[j] = 0.0f;
  const int64_t end = last * s.group;
  int64_t i = first * s.group;
  auto some = [&](auto width) {
    constexpr int R = decltype(width)::value;
    const SomeRows<R> here(s, number, i, end);
    AddRows<Type, R, Scaled>(s, here, i, total);
    i += R;
  };
  // The sums of several tokens no longer lie in the first cache: more rows are added to them at a time.
  while (s.tokens >= 4 && i + 2 * kRowsTogether <= end) some(Width<2 * kRowsTogether>());
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
  auto take = [&](int64_t end) {
    for (; j < end; ++j) {
      out[count] = static_cast<int32_t>(j);
      count += !(values[j] < least);
    }
  };
  // Where few are taken, most are passed over together.
  while (j + kTogether * kLanes <= n) {
    bool any = false;
    for (int k = 0; k < kTogether; ++k) any |= NotBelow(Load(values + j + k * kLanes), floor);
    if (any)
      take(j + kTogether * kLanes);
    else
      j += kTogether * kLanes;
  }
  take(n);
  return count;
}
