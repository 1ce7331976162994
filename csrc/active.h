// Trainable tokens in tiles of equal number, in order. Sums over such tiles have the same bits whatever masked positions
// lie between the tokens. A tile without gaps is not copied.
#pragma once

#include <cstring>

namespace rlhf {

constexpr int kActiveTile = 512;
constexpr long kCountBlock = 4096;  // positions whose tokens are counted together, to find where a tile begins

inline long count_true(const bool* mask, long first, long last) {
  long count = 0;
  for (long i = first; i < last;) {
    unsigned char part = 0;  // of at most 255, so that the loop below adds bytes
    const long stop = last - i < 255 ? last : i + 255;
    for (; i < stop; ++i) part += reinterpret_cast<const unsigned char*>(mask)[i] != 0;  // not every true byte is 1
    count += part;
  }
  return count;
}

// The position of a token by its number; `before` (blocks + 1) holds the tokens in front of each block.
inline long locate(const bool* mask, const long* before, long blocks, long token) {
  long low = 0, high = blocks;  // before[low] <= token < before[high]
  while (high - low > 1) {
    const long middle = (low + high) / 2;
    (before[middle] <= token ? low : high) = middle;
  }
  long position = low * kCountBlock, left = token - before[low];
  for (;; ++position)
    if (mask[position] && left-- == 0) return position;
}

struct ActiveTile {
  long first, end;  // positions it spans, the next tile begins at `end` or later
  int count;
  bool dense;  // count == end - first
  long index[kActiveTile];

  // `position`: of its first token.
  void set(const bool* mask, long position, int tokens) {
    first = position, count = tokens;
    dense = !std::memchr(mask + position, 0, tokens);
    end = position + tokens;
    if (dense) return;
    for (int found = 0; found < tokens; ++position)
      if (mask[position]) index[found++] = position;
    end = position;
  }

  // Their numbers: those of x itself, or `copy` filled with them.
  const float* gather(const float* x, float* copy) const {
    if (dense) return x + first;
    for (int i = 0; i < count; ++i) copy[i] = x[index[i]];
    return copy;
  }

  // Writes to the tokens' places, and 0 between them.
  void scatter(const float* numbers, float* out) const {
    if (dense) {
      std::memcpy(out + first, numbers, count * sizeof(float));
      return;
    }
    std::memset(out + first, 0, (end - first) * sizeof(float));
    for (int i = 0; i < count; ++i) out[index[i]] = numbers[i];
  }
};

inline long count_blocks(long size) { return (size + kCountBlock - 1) / kCountBlock; }

// work(number, tile) for tiles [first, last), gap(begin, end) for the positions in between, in front and behind.
template <class Work, class Gap>
void each_tile(const bool* mask, long size, const long* before, long first, long last, const Work& work, const Gap& gap) {
  const long blocks = count_blocks(size), tokens = before[blocks];
  if (first >= last) return;
  ActiveTile tile;
  long position = locate(mask, before, blocks, first * kActiveTile);
  if (first == 0) gap(0, position);
  for (long t = first; t < last; ++t) {
    const long left = tokens - t * kActiveTile;
    tile.set(mask, position, static_cast<int>(left < kActiveTile ? left : kActiveTile));
    work(t, tile);
    position = tile.end;
    while (position < size && !mask[position]) ++position;
    gap(tile.end, position);
  }
}

}  // namespace rlhf
