// gae and kl_gae on the GPU. The unit is a tile of 512 positions, counted from a sequence's own last token and worked off
// by one warp: 16 positions a lane. A tile maps the advantage behind it to the one at its front, A -> a A + b; maps are
// found for all tiles at once, and folded one after the other from the sequence's end. Which warp, block or launch finds
// a map changes nothing about it, so a sequence has the same bits in any batch, padded or packed.
//
//     sequences of up to one tile    a warp each
//     few long sequences             a block per eight tiles, after a launch that finds all maps
//     others                         a block each, eight tiles at a time
#include "cuda_compat.h"
#include "gae.h"
#include "ops.h"

namespace rlhf {
namespace {

constexpr long kMostChunks = 65535;  // the most blocks that a grid's second axis holds
constexpr int kItems = 16, kTile = kWarp * kItems, kWarps = 8, kThreads = kWarps * kWarp, kChunk = kWarps * kTile;

struct Map {  // of the advantages, and of those with value_lam
  float scale, shift, value_scale, value_shift;
};

__device__ Map identity() { return {1.f, 0.f, 1.f, 0.f}; }

__device__ Map compose(const Map& later, const Map& earlier) {  // `later` in time is applied first
  return {earlier.scale * later.scale, earlier.shift + earlier.scale * later.shift,
          earlier.value_scale * later.value_scale, earlier.value_shift + earlier.value_scale * later.value_shift};
}

struct Carry {
  float advantage, value_advantage;
};

__device__ Carry apply(const Map& map, const Carry& c) {
  return {map.shift + map.scale * c.advantage, map.value_shift + map.value_scale * c.value_advantage};
}

struct Sequence {
  long number, begin, end, place;  // [begin, place] takes part; place: begin - 1 if nothing does
  float decay, value_decay;
};

// Shared memory of a warp. A lane's 16 positions are apart from the next lane's by 17, so no two lanes meet in a bank.
struct Buffer {
  float rewards[kTile + kWarp], values[kTile + kWarp];
  unsigned char mask[kTile + kWarp];  // bit 0: takes part, bit 1: trainable
};

__device__ int padded(int i) { return i + i / kItems; }

__device__ Sequence limits(const Gae& op, long number) {
  Sequence s;
  s.number = number;
  s.begin = op.sequences.offsets ? op.sequences.offsets[number] : number * op.sequences.length;
  s.end = op.sequences.offsets ? op.sequences.offsets[number + 1] : s.begin + op.sequences.length;
  s.place = s.begin - 1;
  s.decay = static_cast<float>(op.gamma * (op.lam ? op.lam[number] : op.lam_all));
  const double value_lam = op.value_lam ? op.value_lam[number] : op.value_lam_all;
  s.value_decay = op.two_lambdas ? static_cast<float>(op.gamma * value_lam) : s.decay;
  return s;
}

// The last true position of [low, end) that a warp sees, each lane as number `me` of `stride` threads, 16 each; or low - 1.
__device__ long last_seen(const bool* mask, long low, long end, int me, int stride) {
  long found = low - 1;
  for (int i = 0; i < kItems; ++i) {
    const long p = end - 1 - me - static_cast<long>(i) * stride;
    if (p > found && mask[p]) found = p;
  }
  for (int o = kWarp / 2; o; o /= 2) {
    const long other = __shfl_xor_sync(kAllLanes, found, o);
    found = other > found ? other : found;
  }
  return found;
}

__device__ void leave_room_for_score(const Gae& op, Sequence& s) {
  if (op.shaped && op.shaping.after && s.place >= s.begin && s.place + 1 < s.end) ++s.place;
}

__device__ Sequence sequence_of_warp(const Gae& op, long number, int lane) {
  Sequence s = limits(op, number);
  for (long end = s.end; end > s.begin && s.place < s.begin; end -= kTile) {
    const long low = end - kTile > s.begin ? end - kTile : s.begin;
    const long found = last_seen(op.sequences.mask, low, end, lane, kWarp);
    if (found >= low) s.place = found;
  }
  leave_room_for_score(op, s);
  return s;
}

__device__ Sequence sequence_of_block(const Gae& op, long number) {
  __shared__ long seen[kWarps];
  Sequence s = limits(op, number);
  for (long end = s.end; end > s.begin && s.place < s.begin; end -= kThreads * kItems) {
    const long low = end - kThreads * kItems > s.begin ? end - kThreads * kItems : s.begin;
    const long found = last_seen(op.sequences.mask, low, end, threadIdx.x, kThreads);
    if (threadIdx.x % kWarp == 0) seen[threadIdx.x / kWarp] = found;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w)
      if (seen[w] >= low && seen[w] > s.place) s.place = seen[w];
    __syncthreads();
  }
  leave_room_for_score(op, s);
  return s;
}

__device__ float shaped_reward(const Gae& op, const Sequence& s, long p, bool trainable, bool write) {
  const Shaping& shaping = op.shaping;
  float kl = 0.f, reward = 0.f;
  if (trainable) {
    with_kind(shaping.kl.kind, [&](auto kind) { kl = kl_estimate<kind.kValue>(shaping.kl, shaping.logprobs[p] - shaping.ref_logprobs[p]); });
    reward = shaping.kl_coef != 0.f ? -shaping.kl_coef * kl : 0.f;
  }
  if (p == s.place) reward += clamp(shaping.scores[s.number], -shaping.score_bound, shaping.score_bound);
  if (write) {
    shaping.kl_out[p] = kl;
    shaping.rewards[p] = reward;
    shaping.value_mask[p] = trainable || p == s.place;
  }
  return reward;
}

// V of the next position that takes part, behind position `high`, for the whole warp.
__device__ float value_behind(const Gae& op, const Sequence& s, long high, int lane) {
  if (high == s.place) return op.bootstrap ? op.bootstrap[s.number] : 0.f;
  for (long from = high + 1;; from += kWarp) {
    const long p = from + lane;
    const bool trainable = p <= s.place && (op.sequences.mask[p] || p == s.place);
    const unsigned found = __ballot_sync(kAllLanes, trainable);
    if (op.decay) return found & 1u ? op.values[from] : 0.f;
    if (found) return op.values[from + __ffs(found) - 1];
  }
}

// Loads a tile, and leaves deltas in `rewards`. Returns the lane's inclusive map: of its own and all positions behind.
__device__ Map map_of(const Gae& op, const Sequence& s, long high, int count, int lane, bool write, Buffer& buffer) {
  for (int k = 0; k < kItems; ++k) {
    const int i = k * kWarp + lane, at = padded(i);
    if (i >= count) {
      buffer.mask[at] = 0;
      continue;
    }
    const long p = high - i;
    const bool trainable = op.sequences.mask[p], part = trainable || p == s.place;
    const float reward = op.shaped ? shaped_reward(op, s, p, trainable, write) : (part ? op.rewards[p] : 0.f);
    buffer.rewards[at] = reward;
    buffer.values[at] = part ? op.values[p] : 0.f;
    buffer.mask[at] = (part || op.decay) | trainable << 1 | part << 2;
  }
  const float behind = count > 0 ? value_behind(op, s, high, lane) : 0.f;
  __syncwarp();
  bool any = false;
  float foremost = 0.f;
  for (int q = 0; q < kItems; ++q) {
    const int at = padded(lane * kItems + q);
    if (buffer.mask[at] & 1) any = true, foremost = buffer.values[at];
  }
  const unsigned lanes = __ballot_sync(kAllLanes, any) & ((1u << lane) - 1u);
  const float passed = __shfl_sync(kAllLanes, foremost, lanes ? 31 - __clz(lanes) : 0);
  float next_value = lanes ? passed : behind;
  Map map = identity();
  const float gamma = static_cast<float>(op.gamma);
  for (int q = 0; q < kItems; ++q) {
    const int at = padded(lane * kItems + q);
    if (!(buffer.mask[at] & 1)) continue;
    const float delta = td_error(buffer.rewards[at], buffer.values[at], next_value, gamma);
    buffer.rewards[at] = delta;
    next_value = buffer.values[at];
    map = compose(map, {s.decay, delta, s.value_decay, delta});
  }
  for (int o = 1; o < kWarp; o *= 2) {
    const Map other{__shfl_up_sync(kAllLanes, map.scale, o), __shfl_up_sync(kAllLanes, map.shift, o),
                    __shfl_up_sync(kAllLanes, map.value_scale, o), __shfl_up_sync(kAllLanes, map.value_shift, o)};
    if (lane >= o) map = compose(other, map);
  }
  return map;
}

// The recursion itself, from what each lane is handed; outputs, and the moments of the trainable tokens.
__device__ Moments finish(const Gae& op, const Sequence& s, long high, int count, int lane, const Map& inclusive,
                          const Carry& carry, Buffer& buffer) {
  const Map before{__shfl_up_sync(kAllLanes, inclusive.scale, 1), __shfl_up_sync(kAllLanes, inclusive.shift, 1),
                   __shfl_up_sync(kAllLanes, inclusive.value_scale, 1), __shfl_up_sync(kAllLanes, inclusive.value_shift, 1)};
  Carry c = lane ? apply(before, carry) : carry;
  double sum = 0.0, tokens = 0.0;
  for (int q = 0; q < kItems; ++q) {
    const int at = padded(lane * kItems + q), m = buffer.mask[at];
    if (m & 1) {
      const float delta = buffer.rewards[at];
      c = {advance(delta, s.decay, c.advantage), advance(delta, s.value_decay, c.value_advantage)};
    }
    buffer.rewards[at] = m & 2 ? c.advantage : 0.f;
    buffer.values[at] = m & 4 ? c.value_advantage + buffer.values[at] : 0.f;
    if (m & 2) sum += c.advantage, tokens += 1.0;
  }
  __syncwarp();
  for (int k = 0; k < kItems; ++k) {
    const int i = k * kWarp + lane;
    if (i >= count) continue;
    op.advantages[high - i] = buffer.rewards[padded(i)];
    op.returns[high - i] = buffer.values[padded(i)];
  }
  if (!op.moments) return {};
  for (int o = kWarp / 2; o; o /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, o);
    tokens += __shfl_xor_sync(kAllLanes, tokens, o);
  }
  const double mean = tokens > 0.0 ? sum / tokens : 0.0;
  double squares = 0.0;
  for (int q = 0; q < kItems; ++q) {
    const int at = padded(lane * kItems + q);
    const double apart = buffer.rewards[at] - mean;
    if (buffer.mask[at] & 2) squares += apart * apart;
  }
  for (int o = kWarp / 2; o; o /= 2) squares += __shfl_xor_sync(kAllLanes, squares, o);
  return {tokens, mean, squares};
}

__device__ void clear(const Gae& op, long begin, long end, int me, int stride) {
  for (long p = begin + me; p < end; p += stride) {
    op.advantages[p] = op.returns[p] = 0.f;
    if (op.shaped) op.shaping.rewards[p] = op.shaping.kl_out[p] = 0.f, op.shaping.value_mask[p] = false;
  }
}

__device__ int tile_count(const Sequence& s, long high) {
  const long left = high - s.begin + 1;
  return static_cast<int>(left <= 0 ? 0 : (left < kTile ? left : kTile));
}

__global__ void __launch_bounds__(kThreads) warp_per_sequence(Gae op) {
  __shared__ Buffer buffers[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const long number = static_cast<long>(blockIdx.x) * kWarps + warp;
  if (number >= op.sequences.count) return;
  const Sequence s = sequence_of_warp(op, number, lane);
  clear(op, s.place + 1, s.end, lane, kWarp);
  Carry carry{0.f, 0.f};
  Moments sequence{}, chunk{};
  int tile = 0;
  for (long high = s.place; high >= s.begin; high -= kTile, ++tile) {
    const int count = tile_count(s, high);
    const Map map = map_of(op, s, high, count, lane, true, buffers[warp]);
    if (tile % kWarps == 0) sequence = merge(sequence, chunk), chunk = {};
    chunk = merge(chunk, finish(op, s, high, count, lane, map, carry, buffers[warp]));
    const Map whole{__shfl_sync(kAllLanes, map.scale, 31), __shfl_sync(kAllLanes, map.shift, 31),
                    __shfl_sync(kAllLanes, map.value_scale, 31), __shfl_sync(kAllLanes, map.value_shift, 31)};
    carry = apply(whole, carry);
    __syncwarp();
  }
  if (op.moments && lane == 0) op.moments[number] = merge(sequence, chunk);
}

// Blocks (sequence, chunk), or (sequence) with all its chunks in turn. `maps`: those of all tiles behind, or null.
__global__ void __launch_bounds__(kThreads) block_per_chunk(Gae op, const Map* maps, long tiles_per_sequence, bool all_chunks) {
  __shared__ Buffer buffers[kWarps];
  __shared__ Map own[kWarps];
  __shared__ Map behind[kThreads];
  __shared__ Moments parts[kWarps];
  __shared__ Moments sequence;  // only its first thread's business: registers of every thread would spill
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) sequence = {};
  const Sequence s = sequence_of_block(op, blockIdx.x);
  const long cleared = all_chunks ? s.begin : s.begin + static_cast<long>(blockIdx.y) * kChunk;
  clear(op, cleared > s.place + 1 ? cleared : s.place + 1, all_chunks || cleared + kChunk > s.end ? s.end : cleared + kChunk, threadIdx.x, kThreads);
  Carry carry{0.f, 0.f};
  const long first_chunk = all_chunks ? 0 : blockIdx.y;
  for (long done = 0; done < first_chunk * kWarps; done += kThreads) {  // what the chunks behind this one do
    const long left = first_chunk * kWarps - done, here = left < kThreads ? left : kThreads;
    if (threadIdx.x < here) behind[threadIdx.x] = maps[s.number * tiles_per_sequence + done + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < here; ++i) carry = apply(behind[i], carry);
    __syncthreads();
  }
  for (long chunk = first_chunk; s.place - chunk * kChunk >= s.begin; ++chunk) {
    const long high = s.place - chunk * kChunk - warp * kTile;
    const int count = tile_count(s, high);
    const Map map = map_of(op, s, high, count, lane, true, buffers[warp]);
    if (lane == kWarp - 1) own[warp] = map;
    __syncthreads();
    Carry mine = carry;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) mine = carry;
      carry = apply(own[w], carry);
    }
    const Moments tile = finish(op, s, high, count, lane, map, mine, buffers[warp]);
    if (lane == 0) parts[warp] = tile;
    __syncthreads();
    if (op.moments && threadIdx.x == 0) {
      Moments merged{};
      for (int w = 0; w < kWarps; ++w) merged = merge(merged, parts[w]);
      sequence = merge(sequence, merged);
    }
    if (!all_chunks) break;
  }
  if (op.moments && threadIdx.x == 0) op.moments[all_chunks ? s.number : s.number * gridDim.y + blockIdx.y] = sequence;
}

__global__ void __launch_bounds__(kThreads) maps_of_all_tiles(Gae op, Map* maps, long tiles_per_sequence) {
  __shared__ Buffer buffers[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Sequence s = sequence_of_block(op, blockIdx.x);
  const long tile = static_cast<long>(blockIdx.y) * kWarps + warp, high = s.place - tile * kTile;
  const Map map = map_of(op, s, high, tile_count(s, high), lane, false, buffers[warp]);
  if (lane == kWarp - 1 && tile < tiles_per_sequence) maps[s.number * tiles_per_sequence + tile] = map;
}

}  // namespace
}  // namespace rlhf

using namespace rlhf;

extern "C" GaePlan rlhf_gae_plan(long count, long length, long size, bool packed) {
  const long usual = packed ? (count ? size / count : 0) : length;  // a packed batch's longest would have to be waited for
  if (usual <= kTile) return {kWarpEach, 1, 0};
  const long chunks = (length + kChunk - 1) / kChunk;
  if (packed || chunks == 1 || chunks > kMostChunks || count >= kManySequences) return {kBlockEach, 1, 0};
  return {kSplit, chunks, static_cast<long>(sizeof(Map)) * count * chunks * kWarps};
}

extern "C" int rlhf_gae_cuda(const Gae* op, GaePlan plan, void* maps, void* stream) {
  const long count = op->sequences.count;
  if (count == 0) return 0;
  const unsigned rows = static_cast<unsigned>(count);
  if (plan.mode == kWarpEach) {
    const unsigned blocks = static_cast<unsigned>((count + kWarps - 1) / kWarps);
    RLHF_LAUNCH(warp_per_sequence, blocks, kThreads, stream, *op);
    return RLHF_LAST_ERROR();
  }
  const dim3 grid(rows, static_cast<unsigned>(plan.chunks));
  const long tiles = plan.chunks * kWarps;
  Map* map = static_cast<Map*>(maps);
  if (plan.mode == kSplit) RLHF_LAUNCH(maps_of_all_tiles, grid, kThreads, stream, *op, map, tiles);
  RLHF_LAUNCH(block_per_chunk, grid, kThreads, stream, *op, map, tiles, plan.mode == kBlockEach);
  return RLHF_LAST_ERROR();
}
