// Multiplication by weights in binary coding: rows of inputs are rounded once, in turns that stay in the cache, then every
// tile of output rows is an item of its own.
#include "matmul.h"

#include <algorithm>

#include "dispatch.h"
#include "operations.h"
#include "threads.h"

namespace mikv {
namespace {

constexpr int64_t kThreadBytes = int64_t{1} << 18;  // of codes to be read, times rows, that another thread is woken for
constexpr int64_t kItemsPerThread = 4;              // so that threads that are held up leave work to others
constexpr int64_t kLeastRows = 32;                  // of inputs that are worth decoding a tile for once more

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
size_t rounded_up(size_t bytes) { return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes; }

// Rows [first, first + count) of inputs and what is prepared of them, carved out of scratch memory.
struct Turn {
  MatmulRows rows;
  size_t data_bytes, steps_bytes, sums_bytes;

  Turn(const Matmul& call, int64_t first, int64_t count, bool tables)
      : rows{first, count, nullptr, nullptr, nullptr, nullptr},
        data_bytes(size_t(count * (tables ? columns_of(call) * kTableBytes : byte_stride(call)))),
        steps_bytes(rounded_up(size_t(count * chunks_of(call)) * sizeof(float))),
        sums_bytes(rounded_up(size_t(count * groups_of(call)) * sizeof(float))) {}

  size_t bytes() const { return rounded_up(data_bytes) + 2 * steps_bytes + sums_bytes; }

  void carve(char* scratch) {
    rows.data = reinterpret_cast<uint8_t*>(scratch);
    rows.steps = reinterpret_cast<float*>(scratch + rounded_up(data_bytes));
    rows.rounded = reinterpret_cast<float*>(scratch + rounded_up(data_bytes) + steps_bytes);
    rows.sums = reinterpret_cast<float*>(scratch + rounded_up(data_bytes) + 2 * steps_bytes);
  }
};

void multiply_by_tables(const Matmul& call, int64_t first, int64_t count, int num_threads) {
  Turn turn(call, first, count, true);
  const size_t thread_bytes = rounded_up(prepare_scratch_bytes(call));
  const Scratch scratch(turn.bytes() + thread_bytes, 1);
  turn.carve(scratch.share(0) + thread_bytes);
  for (int64_t row = 0; row < count; ++row) kernels().prepare_tables(call, turn.rows, row, scratch.share(0));
  parallel_for(tiles_of(call), num_threads,
               [&](int64_t tile, int) { kernels().lut_tile(call, turn.rows, tile); });
}

void multiply_by_bytes(const Matmul& call, int64_t first, int64_t count, int num_threads) {
  Turn turn(call, first, count, false);
  const int64_t tiles = tiles_of(call);
  // few tiles are decoded several times, so that all threads have some
  const int64_t wanted = num_threads == 1 ? 1 : divided_up(kItemsPerThread * num_threads, tiles);
  const int64_t parts = std::clamp(count / kLeastRows, int64_t{1}, wanted), part_rows = divided_up(count, parts);
  const size_t thread_bytes =
      rounded_up(std::max(prepare_scratch_bytes(call), byte_tile_scratch_bytes(call, part_rows)));
  const Scratch scratch(turn.bytes() + thread_bytes * size_t(num_threads), 1);
  char* threads = scratch.share(0);
  turn.carve(threads + thread_bytes * size_t(num_threads));
  parallel_for(count, count < kLeastRows ? 1 : num_threads, [&](int64_t row, int thread) {
    kernels().prepare_bytes(call, turn.rows, row, threads + thread_bytes * size_t(thread));
  });
  parallel_for(tiles * parts, num_threads, [&](int64_t item, int thread) {
    const int64_t start = item % parts * part_rows, stop = std::min(start + part_rows, count);
    if (start < stop) {
      kernels().byte_tile(call, turn.rows, item / parts, start, stop - start, threads + thread_bytes * size_t(thread));
    }
  });
}

}  // namespace

void matmul(const Matmul& call, MatmulPath path, int most_threads) {
  const bool tables = path == kTables || (path == kFaster && call.num_rows <= kernels().most_lut_rows);
  const int64_t turn_rows = tables ? kLutRows : kByteRows;
  const int64_t work = tiles_of(call) * columns_of(call) * call.bits * kTileRows * std::min(call.num_rows, turn_rows);
  const int num_threads = worthwhile_threads(work, kThreadBytes, most_threads);
  for (int64_t first = 0; first < call.num_rows; first += turn_rows) {
    const int64_t count = std::min(turn_rows, call.num_rows - first);
    if (tables) {
      multiply_by_tables(call, first, count, num_threads);
    } else {
      multiply_by_bytes(call, first, count, num_threads);
    }
  }
}

}  // namespace mikv
