// From Python's tensors to the structs of kernels.h. Every dtype, shape, stride and index is checked here, before any
// work, with a message that names the argument, its value and what is expected. Numbers are never copied or converted;
// indices are copied, so that they stay what they were when they were checked, whoever writes to the tensor meanwhile.
#pragma once

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "array.h"
#include "kernels.h"

namespace mikv {

using MaybeArray = std::optional<Array>;

// Parts in order (data, or codes, scale and zero, of keys and then of values), pages, counts, and (numbers, bits,
// group_size) of keys, the same of values, and whether they are transformed.
using TierArgument = std::tuple<std::vector<Array>, Array, Array, std::array<int32_t, 7>>;

// key center, key balancer, value center, sizes of the key and value rotations (1: none)
using TransformArgument = std::tuple<MaybeArray, MaybeArray, MaybeArray, int32_t, int32_t>;

// At most 5 axes; made many times per call, so it allocates nothing.
struct Shape {
  int64_t sizes[5] = {};
  size_t num_axes = 0;

  Shape(std::initializer_list<int64_t> all) {
    for (int64_t size : all) sizes[num_axes++] = size;
  }
};

std::string text(int64_t);
std::string text(const Shape&);
std::string text(const nanobind::dlpack::dtype&);
inline std::string text(const std::string& words) { return words; }

// Throws a ValueError that says the pieces one after the other.
template <class... Pieces>
[[noreturn]] void refuse(const Pieces&... pieces) {
  throw nanobind::value_error((text(pieces) + ...).c_str());
}

void require_axes(const char* name, const Array&, size_t num_axes);
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

int32_t require_range(const char* name, int64_t value, int64_t low, int64_t high);
int require_threads(int num_threads);
float require_finite(const char* name, float value);

// That `written`, the result `name`, shares no memory with any of `others`, of which some may be missing.
using Others = std::initializer_list<const Array*>;
void require_apart(const char* name, const Array& written, Others others);
inline const Array* maybe(const MaybeArray& array) { return array ? &*array : nullptr; }

// A contiguous array of one dtype and shape.
template <class T>
T* numbers_of(const char* name, const Array&, const Shape&);
template <class T>
T* numbers_of(const char* name, const MaybeArray& array, const Shape& shape) {
  return array ? numbers_of<T>(name, *array, shape) : nullptr;
}

// The numbers of a contiguous array of the dtype and shape of `other`.
void* whole_like(const char* name, const Array&, const Array& other);

// Contiguous floats (..., n) of at most 5 axes: where they are, their numbers, and how many rows of n there are.
struct Rows {
  void* data;
  Numbers numbers;
  int64_t num_rows;
};
Rows rows_of(const char* name, const Array&, int64_t n);

// Floats (B, heads, T, D), or (heads, T, D) of one row, with contiguous channels.
Tokens tokens_of(const char* name, const Array&, const Shape&);

// The pages and counts of a tier, which must outlive it.
struct Indices {
  std::vector<int32_t> pages;
  std::vector<int64_t> counts;
};

// A tier of G heads, and how many pages and rows it has.
Tier tier_of(const char* name, const TierArgument&, int64_t num_kv_heads, int64_t head_dim, Indices&);
void require_apart(const char* name, const Array& written, const TierArgument&);
int64_t num_pages(const TierArgument&);
int64_t num_rows(const TierArgument&);
int64_t capacity(const Tier&);

// Bookkeeping (P, G, blocks, 32) of the high tier.
template <class T>
Part book_part_of(const char* name, const Array&, const Shape&);

// That `count` slots of a row from `first` on have pages; that all tokens of a row do.
void require_slots(const char* name, const Tier&, int64_t num_pages, int64_t row, int64_t first, int64_t count);
void require_counts(const char* name, const Tier&, int64_t num_pages, int64_t row);

// Transforms of all rows (B, G, 1, D) or of one (G, 1, D).
std::pair<Transform, Transform> transforms_of(const TransformArgument&, const Shape&);

// Error feedback (G, D, D) of one row for keys of a format that takes it, or null.
const float* feedback_of(const MaybeArray&, const Format& keys, const Shape&);

// A boolean mask (B or 1, 1, Tq, T) and its strides of rows and queries.
const uint8_t* mask_of(const MaybeArray&, const Shape&, int64_t* batch_stride, int64_t* query_stride);

}  // namespace mikv
