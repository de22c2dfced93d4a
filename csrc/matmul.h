// Multiplication by weights in binary coding: what the operation and the kernels of all instruction sets agree on.
// `mikv.ops.matmul` describes the arranged weights in Python. M output rows, K inputs, N groups of inputs.
//
//     codes   (tiles of 64 output rows, bytes)  groups; of a group planes; of a plane byte columns of 8 inputs, 64 bytes
//                                               each: byte 2 i + h is row 32 h + i of the tile, bit t is input t
//     scales  f16 (tiles, N, n, 64)             one of each plane, or of the first if uniform; then the offset, if any
//
// Inputs are rounded in chunks, groups cut into runs of up to 32, each of which has a step of its own.
#pragma once

#include "kernels.h"

namespace mikv {

constexpr int kTileRows = 64;
constexpr int kColumnInputs = 8;
constexpr int kChunkColumns = 4;
constexpr int kMaxPlanes = 8;
constexpr int kTableBytes = 32;  // of a byte column: two tables of 16 entries, for the low and the high nibble

// One call, as the caller states it.
struct Matmul {
  int64_t out_features, in_features, group_size;
  int32_t planes, bits;  // planes that codes hold, and how many of them are read, the first ones
  int32_t uniform, has_offset;
  int64_t num_rows;
  Numbers numbers, bias_numbers;
  const void* inputs;  // (rows, K) contiguous
  const uint8_t* codes;
  const uint16_t* scales;
  const void* bias;  // (M,) or null
  void* output;      // (rows, M) contiguous, of the numbers of inputs
};

// Some rows of inputs as one of the two ways of multiplication wants them.
struct MatmulRows {
  int64_t first, count;  // of the call's rows
  uint8_t* data;         // (count, columns, 32) tables, or (count, byte_stride) signed bytes
  float* steps;          // (count, chunks): what 1 of a table or byte stands for
  float* rounded;        // (count, chunks): sum of the bytes; unused by tables
  float* sums;           // (count, groups): of the inputs themselves, for the offset
};

static inline int64_t tiles_of(const Matmul& m) { return (m.out_features + kTileRows - 1) / kTileRows; }
static inline int64_t groups_of(const Matmul& m) { return (m.in_features + m.group_size - 1) / m.group_size; }
static inline int64_t columns_of(const Matmul& m) { return (m.in_features + kColumnInputs - 1) / kColumnInputs; }
static inline int64_t group_columns(const Matmul& m) { return (m.group_size + kColumnInputs - 1) / kColumnInputs; }
static inline int64_t group_chunks(const Matmul& m) { return (group_columns(m) + kChunkColumns - 1) / kChunkColumns; }
static inline int64_t byte_stride(const Matmul& m) { return (columns_of(m) * kColumnInputs + 63) / 64 * 64; }
static inline int64_t chunks_of(const Matmul& m) { return groups_of(m) * group_chunks(m); }  // some unused if ragged
static inline int64_t scales_of(const Matmul& m) { return (m.uniform ? 1 : m.bits) + m.has_offset; }
static inline int64_t tile_bytes(const Matmul& m) { return columns_of(m) * m.planes * kTileRows; }
static inline int64_t tile_scales(const Matmul& m) { return groups_of(m) * scales_of(m) * kTileRows; }

// Byte columns of a row that belong together: those of one group, or of one of its chunks.
struct Columns {
  int64_t first, count;
};
static inline Columns columns_of_group(const Matmul& m, int64_t group) {
  const int64_t first = group * group_columns(m), left = columns_of(m) - first;
  return {first, left < group_columns(m) ? left : group_columns(m)};
}
static inline Columns columns_of_chunk(const Columns& group, int64_t chunk) {
  const int64_t start = chunk * kChunkColumns, left = group.count - start;
  return {group.first + start, left < kChunkColumns ? left : kChunkColumns};
}
static inline int64_t chunks_of(const Columns& group) { return (group.count + kChunkColumns - 1) / kChunkColumns; }

// Rows of inputs that are prepared at a time. More would decode a tile less often, but leave the cache.
constexpr int kLutRows = 16;
constexpr int kByteRows = 256;

// Scratch bytes of one thread.
size_t prepare_scratch_bytes(const Matmul&);
size_t byte_tile_scratch_bytes(const Matmul&, int64_t num_rows);

}  // namespace mikv
