// Attention's operation: divides the tokens of every KV head into shares, so that one long sequence keeps all threads
// busy, and lets the thread that finishes the last share of a head join them.
#include <algorithm>
#include <atomic>
#include <memory>

#include "dispatch.h"
#include "operations.h"
#include "threads.h"

namespace mikv {
namespace {

constexpr int64_t kShareTokens = 512;    // fewer are not worth the preparation of their queries
constexpr int64_t kSharesPerThread = 4;  // so that threads that are held up leave work to others
constexpr int64_t kThreadProducts = int64_t{1} << 21;  // multiply-adds that another thread is woken for
constexpr int64_t kTileBlocks = 4;       // shares begin at tiles of the kernels

int64_t blocks_of(const Tier& tier, int64_t row) { return (tier.counts[row] + kBlockTokens - 1) / kBlockTokens; }

int64_t longest_row(const Attend& call) {
  int64_t longest = 0;
  for (int64_t row = 0; row < call.batch; ++row) {
    int64_t tokens = 0;
    for (int i = 0; i < call.num_tiers; ++i) tokens += call.tiers[i].counts[row];
    longest = std::max(longest, tokens);
  }
  return longest;
}

int64_t share_count(const Attend& call, int64_t longest, int num_threads) {
  if (num_threads == 1) return 1;
  const int64_t heads = int64_t{call.batch} * call.num_kv_heads;
  const int64_t wanted = (kSharesPerThread * num_threads + heads - 1) / heads;
  return std::clamp(longest / kShareTokens, int64_t{1}, wanted);
}

// First block of share `share` of `num_shares` of a tier of `blocks`.
int64_t share_start(int64_t blocks, int64_t share, int64_t num_shares) {
  const int64_t tiles = (blocks + kTileBlocks - 1) / kTileBlocks;
  return std::min(tiles * share / num_shares * kTileBlocks, blocks);
}

size_t rounded_up(size_t bytes) { return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes; }

// Where the results of all shares of one turn are.
struct Results {
  int64_t num_shares, rows, channels, slots[2], num_new;
  char* data;

  size_t numbers() const { return rounded_up(size_t(num_shares * rows) * sizeof(float)); }
  size_t vectors() const { return rounded_up(size_t(num_shares * rows * channels) * sizeof(float)); }
  size_t logits(int64_t tokens) const { return rounded_up(size_t(rows * tokens) * sizeof(float)); }
  size_t head_bytes() const {
    return 3 * numbers() + 2 * vectors() + logits(slots[0]) + logits(slots[1]) + logits(num_new);
  }

  AttendJoin of_head(int64_t head) const {
    char* at = data + size_t(head) * head_bytes();
    const auto next = [&at](size_t bytes) {
      float* start = reinterpret_cast<float*>(at);
      at += bytes;
      return bytes ? start : nullptr;
    };
    AttendJoin join = {};
    join.maximum = next(numbers()), join.total = next(numbers()), join.mass = next(numbers());
    join.plain = next(vectors()), join.transformed = next(vectors());
    for (int i = 0; i < 2; ++i) join.logits[i] = next(logits(slots[i])), join.logits_stride[i] = slots[i];
    join.logits_new = next(logits(num_new));
    join.num_shares = int32_t(num_shares);
    return join;
  }
};

AttendShare share_of(const Attend& call, const AttendJoin& join, int64_t index, int64_t rows, int64_t channels) {
  AttendShare share = {};
  share.row = join.row, share.head = join.head;
  share.first_query = join.first_query, share.num_queries = join.num_queries;
  for (int i = 0; i < call.num_tiers; ++i) {
    const int64_t blocks = blocks_of(call.tiers[i], join.row);
    share.first_block[i] = share_start(blocks, index, join.num_shares);
    share.stop_block[i] = share_start(blocks, index + 1, join.num_shares);
    share.logits[i] = join.logits[i], share.logits_stride[i] = join.logits_stride[i];
  }
  share.with_new = index == join.num_shares - 1;
  share.logits_new = join.logits_new;
  share.maximum = const_cast<float*>(join.maximum) + index * rows;
  share.total = const_cast<float*>(join.total) + index * rows;
  share.mass = const_cast<float*>(join.mass) + index * rows;
  share.plain = const_cast<float*>(join.plain) + index * rows * channels;
  share.transformed = const_cast<float*>(join.transformed) + index * rows * channels;
  return share;
}

// The queries [first_query, first_query + num_queries) of all rows and heads.
void attend_turn(const Attend& call, int32_t first_query, int32_t num_queries, int most_threads) {
  const int64_t heads = int64_t{call.batch} * call.num_kv_heads, longest = longest_row(call);
  Results results = {};
  results.rows = int64_t{call.group} * num_queries;
  const int64_t products = 2 * heads * results.rows * (longest + call.num_new) * call.head_dim;
  const int num_threads = worthwhile_threads(products, kThreadProducts, most_threads);
  results.num_shares = share_count(call, longest, num_threads);
  results.channels = padded_channels(call.head_dim);
  for (int i = 0; i < call.num_tiers; ++i)
    if (call.received[i]) results.slots[i] = call.received_stride[i];
  if (call.received_new) results.num_new = call.num_new;

  const size_t thread_bytes = rounded_up(attend_scratch_bytes(int32_t(results.rows), call.head_dim));
  const Scratch scratch(thread_bytes * size_t(num_threads) + results.head_bytes() * size_t(heads), 1);
  results.data = scratch.share(0) + thread_bytes * size_t(num_threads);
  const auto left = std::make_unique<std::atomic<int64_t>[]>(size_t(heads));
  for (int64_t head = 0; head < heads; ++head) left[head] = results.num_shares;

  parallel_for(heads * results.num_shares, num_threads, [&](int64_t item, int thread) {
    const int64_t head = item / results.num_shares;
    AttendJoin join = results.of_head(head);
    join.row = int32_t(head / call.num_kv_heads), join.head = int32_t(head % call.num_kv_heads);
    join.first_query = first_query, join.num_queries = num_queries;
    join.scratch = scratch.share(0) + thread_bytes * size_t(thread);
    AttendShare share = share_of(call, join, item % results.num_shares, results.rows, results.channels);
    share.scratch = join.scratch;
    kernels().attend_share(call, share);
    if (left[head].fetch_sub(1, std::memory_order_acq_rel) == 1) kernels().attend_join(call, join);
  });
}

}  // namespace

void attend(const Attend& call, int num_threads) {
  for (int i = 0; i < call.num_tiers && call.num_queries == 0; ++i)
    if (call.received[i]) {
      std::fill_n(call.received[i], int64_t{call.batch} * call.num_kv_heads * call.received_stride[i], 0.0f);
    }
  if (call.num_queries == 0 && call.received_new) {
    std::fill_n(call.received_new, int64_t{call.batch} * call.num_kv_heads * call.num_new, 0.0f);
  }
  const int32_t per_turn = std::max(1, kMaxRows / call.group);
  for (int32_t first = 0; first < call.num_queries; first += per_turn)
    attend_turn(call, first, std::min(per_turn, call.num_queries - first), num_threads);
}

// What prepare_queries, carve_work and attend_join carve, whichever is more, each array rounded up to 64 bytes.
size_t attend_scratch_bytes(int32_t rows, int32_t head_dim) {
  const size_t channels = size_t(padded_channels(head_dim)), queries = kMaxHeadDim / 4, units = kMaxHeadDim / kUnitChannels;
  const size_t tile = kTileBlocks * kBlockTokens, chunk = 8, n = size_t(rows);
  const size_t floats = 2 * n * channels + 2 * n                                        // queries
                        + 2 * (n * queries + n * queries * 2 + n * 2 + n * 2 * units)   // rounded
                        + n * tile + units * tile + tile                                // logits, scales, weights
                        + chunk * units * (tile / 4 + tile / 2 + 2 + 1)                 // rounded weights
                        + n + n * units + kBlockTokens * channels                       // terms, decoded block
                        + 2 * n + 2 * channels;                                         // join
  return floats * sizeof(float) + 32 * kVectorBytes;
}

}  // namespace mikv
