#include "arguments.h"

#include <algorithm>
#include <cmath>

namespace mikv {

using nanobind::dlpack::dtype;
using nanobind::dlpack::dtype_code;

std::string text(int64_t number) { return std::to_string(number); }

std::string text(const Shape& shape) {
  std::string all = "(";
  for (size_t i = 0; i < shape.num_axes; ++i) all += (i ? ", " : "") + text(shape.sizes[i]);
  return all + (shape.num_axes == 1 ? ",)" : ")");
}

std::string text(const dtype& type) {
  const auto code = dtype_code(type.code);
  if (code == dtype_code::Bool) return "bool";
  const char* name = code == dtype_code::Float    ? "float"
                     : code == dtype_code::Bfloat ? "bfloat"
                     : code == dtype_code::Int    ? "int"
                     : code == dtype_code::UInt   ? "uint"
                                                  : "another type of bits ";
  return name + text(int64_t(type.bits));
}

namespace {

constexpr dtype kHalf{uint8_t(dtype_code::Float), 16, 1}, kBrain{uint8_t(dtype_code::Bfloat), 16, 1};

template <class T>
constexpr dtype dtype_of() {
  if constexpr (std::is_same_v<T, uint16_t>) return kHalf;  // kernels read 16-bit floats as bits
  return nanobind::dtype<T>();
}

Shape shape_of(const Array& array) {
  Shape shape{};
  for (; shape.num_axes < array.ndim() && shape.num_axes < 5; ++shape.num_axes) {
    shape.sizes[shape.num_axes] = array.shape(shape.num_axes);
  }
  return shape;
}

void require_type(const char* name, const Array& array, const dtype& expected) {
  if (!array.is_on_cpu()) refuse(name, " is not on the CPU; move it with .cpu()");
  if (array.dtype() != expected) refuse(name, " has dtype ", array.dtype(), "; it must be ", expected);
  if (array.is_empty()) return;
  // a fake tensor, or one whose memory was given back
  if (array.data() == nullptr) refuse(name, " has no memory; pass a tensor that holds numbers");
  if (reinterpret_cast<uintptr_t>(array.data()) % (expected.bits / 8) != 0) {
    refuse(name, " does not begin at a whole number in memory; pass .clone()");
  }
}

Numbers float_numbers(const char* name, const Array& array) {
  const dtype type = array.dtype();
  if (type != dtype_of<float>() && type != kHalf && type != kBrain) {
    refuse(name, " has dtype ", type, "; it must be float32, float16 or bfloat16");
  }
  require_type(name, array, type);
  return type == kHalf ? kFloat16 : type == kBrain ? kBfloat16 : kFloat32;
}

void require_shape(const char* name, const Array& array, const Shape& shape) {
  bool equal = array.ndim() == shape.num_axes;
  for (size_t axis = 0; equal && axis < shape.num_axes; ++axis) equal = array.shape(axis) == shape.sizes[axis];
  if (!equal) refuse(name, " has shape ", shape_of(array), "; it must be ", shape);
}

// Axes of one element have no stride that matters, and arrays without elements none at all.
void require_contiguous(const char* name, const Array& array, size_t first_axis) {
  if (array.is_empty()) return;
  int64_t stride = 1;
  for (size_t axis = array.ndim(); axis-- > first_axis;) {
    if (array.shape(axis) != 1 && array.stride(axis) != stride) {
      refuse(name, " is not contiguous from axis ", int64_t(first_axis), " on; pass .contiguous()");
    }
    stride *= array.shape(axis);
  }
}

// Different blocks (P, G, blocks) have different memory: an expanded axis has not.
void require_separate(const char* name, const Array& array) {
  if (array.is_empty()) return;
  std::pair<int64_t, int64_t> axes[3];  // stride and length
  for (size_t axis = 0; axis < 3; ++axis) axes[axis] = {array.stride(axis), array.shape(axis)};
  std::sort(std::begin(axes), std::end(axes));
  int64_t reach = 1;
  for (size_t axis = 3; axis < array.ndim(); ++axis) reach *= array.shape(axis);
  for (const auto& [stride, length] : axes) {
    if (length == 1) continue;
    if (stride < reach) refuse(name, " has blocks that share memory; pass .contiguous()");
    reach += (length - 1) * stride;
  }
}

// One tensor (P, G, blocks, ...) of a tier, whose blocks are contiguous.
Part part_of(const char* name, const Array& array, const dtype& type, const Shape& shape) {
  require_type(name, array, type);
  require_shape(name, array, shape);
  require_contiguous(name, array, 3);
  require_separate(name, array);
  const int64_t bytes = type.bits / 8;
  return {static_cast<char*>(array.data()), array.stride(0) * bytes, array.stride(1) * bytes, array.stride(2) * bytes};
}

void require_format(const char* name, const Format& format, bool keys, int64_t head_dim) {
  require_range(name, format.numbers, kFloat32, kChannel);
  if (format.numbers <= kBfloat16) return;
  if (format.bits != 2 && format.bits != 3 && format.bits != 4 && format.bits != 8) {
    refuse(name, " has codes of ", format.bits, " bits; use 2, 3, 4 or 8");
  }
  if (format.numbers == kChannel && !keys) refuse(name, " has values in per-channel blocks, which only keys can be");
  if (format.numbers == kGroup && (format.group_size <= 0 || head_dim % format.group_size != 0)) {
    refuse(name, " has group_size=", format.group_size, ", which does not divide head_dim=", head_dim);
  }
}

size_t num_parts(const Format& format) { return format.numbers <= kBfloat16 ? 1 : format.numbers <= kUniform ? 2 : 3; }

// Keys or values of (P, G, blocks) from their parts.
Side side_of(const char* name, const Format& format, const Array* parts, const Shape& blocks, int64_t head_dim) {
  const auto of_block = [&](int64_t rows, int64_t columns) {
    return Shape{blocks.sizes[0], blocks.sizes[1], blocks.sizes[2], rows, columns};
  };
  Side side{format, {}, {}, {}};
  if (format.numbers <= kBfloat16) {
    const dtype type = format.numbers == kFloat32 ? dtype_of<float>() : format.numbers == kFloat16 ? kHalf : kBrain;
    side.codes = part_of(name, parts[0], type, of_block(kBlockTokens, head_dim));
    return side;
  }
  const int64_t num_units = padded_channels(int(head_dim)) / kUnitChannels;
  const Shape scale = format.numbers == kChannel ? of_block(1, head_dim)
                      : format.numbers == kGroup ? of_block(head_dim / format.group_size, kBlockTokens)
                                                 : of_block(1, kBlockTokens);
  side.codes = part_of(name, parts[0], dtype_of<uint8_t>(), of_block(num_units, unit_bytes(format.bits)));
  side.scale = part_of(name, parts[1], kHalf, scale);
  if (num_parts(format) == 3) side.zero = part_of(name, parts[2], kHalf, scale);
  return side;
}

Transform transform_of(const MaybeArray& center, const MaybeArray& balancer, int32_t rotation, const Shape& shape) {
  const int64_t head_dim = shape.sizes[shape.num_axes - 1];
  if (rotation <= 0 || (rotation & (rotation - 1)) != 0 || head_dim % rotation != 0) {
    refuse("a rotation of ", rotation, " channels is not a power of two that divides head_dim=", head_dim);
  }
  return {numbers_of<uint16_t>("center", center, shape), numbers_of<uint16_t>("balancer", balancer, shape), rotation};
}

}  // namespace

void require_axes(const char* name, const Array& array, size_t num_axes) {
  if (array.ndim() != num_axes) {
    refuse(name, " has shape ", shape_of(array), "; it must have ", int64_t(num_axes), " axes");
  }
}

int32_t require_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(name, "=", value, " is not in ", low, "..", high);
  return int32_t(value);
}

int require_threads(int num_threads) { return require_range("threads", num_threads, 1, 1024); }  // more, and OpenMP's runtime may give up

float require_finite(const char* name, float value) {
  if (!std::isfinite(value)) refuse(name, " is ", std::to_string(value), "; it must be finite");
  return value;
}

void require_apart(const char* name, const Array& written, Others others) {
  const auto [first, stop] = written.extent();
  for (const Array* other : others) {
    if (other == nullptr || other == &written) continue;
    const auto [other_first, other_stop] = other->extent();
    if (first < other_stop && other_first < stop) {
      refuse(name, " shares memory with another argument; pass a tensor of its own");
    }
  }
}

void require_apart(const char* name, const Array& written, const TierArgument& tier) {
  for (const Array& part : std::get<0>(tier)) require_apart(name, written, {&part});
}

template <class T>
T* numbers_of(const char* name, const Array& array, const Shape& shape) {
  require_type(name, array, dtype_of<T>());
  require_shape(name, array, shape);
  require_contiguous(name, array, 0);
  return static_cast<T*>(array.data());
}
template float* numbers_of(const char*, const Array&, const Shape&);
template uint16_t* numbers_of(const char*, const Array&, const Shape&);
template int32_t* numbers_of(const char*, const Array&, const Shape&);
template int64_t* numbers_of(const char*, const Array&, const Shape&);
template uint8_t* numbers_of(const char*, const Array&, const Shape&);

void* whole_like(const char* name, const Array& array, const Array& other) {
  require_type(name, array, other.dtype());
  require_shape(name, array, shape_of(other));
  require_contiguous(name, array, 0);
  return array.data();
}

Rows rows_of(const char* name, const Array& array, int64_t n) {
  const Numbers numbers = float_numbers(name, array);
  if (array.ndim() == 0 || array.ndim() > 5 || array.shape(array.ndim() - 1) != n) {
    refuse(name, " has shape ", shape_of(array), "; its last axis must be ", n, ", of 1 to 5 axes");
  }
  require_contiguous(name, array, 0);
  return {array.data(), numbers, array.size() / n};
}

Tokens tokens_of(const char* name, const Array& array, const Shape& shape) {
  const Numbers numbers = float_numbers(name, array);
  require_shape(name, array, shape);
  require_contiguous(name, array, shape.num_axes - 1);
  const size_t head = shape.num_axes - 3;
  return {array.data(), numbers,
          head == 1 ? array.stride(0) : 0, array.stride(head), array.stride(head + 1)};
}

Tier tier_of(const char* name, const TierArgument& argument, int64_t num_kv_heads, int64_t head_dim, Indices& own) {
  const auto& [parts, pages, counts, format] = argument;
  const Format keys{Numbers(format[0]), format[1], format[2]}, values{Numbers(format[3]), format[4], format[5]};
  require_format(name, keys, true, head_dim);
  require_format(name, values, false, head_dim);
  const size_t num_key_parts = num_parts(keys), expected = num_key_parts + num_parts(values);
  if (parts.size() != expected) {
    refuse(name, " has ", int64_t(parts.size()), " parts; its formats have ", int64_t(expected));
  }
  require_axes(name, parts[0], 5);
  require_axes("pages", pages, 2);
  for (size_t i = 1; i < parts.size(); ++i)
    for (size_t j = 0; j < i; ++j) {
      if (parts[i].data() == parts[j].data() && !parts[i].is_empty()) refuse(name, " has parts that share memory");
    }
  const int64_t rows = pages.shape(0);
  const int32_t* page = numbers_of<int32_t>("pages", pages, {rows, pages.shape(1)});
  const int64_t* count = numbers_of<int64_t>("counts", counts, {rows});
  const int64_t blocks_per_page = require_range("blocks of a page", parts[0].shape(2), 0, kMaxInt);
  require_range("blocks of a row", pages.shape(1), 0, kMaxInt / std::max<int64_t>(1, blocks_per_page));
  own = {{page, page + pages.size()}, {count, count + rows}};
  const Shape blocks{parts[0].shape(0), num_kv_heads, blocks_per_page};
  return {side_of(name, keys, parts.data(), blocks, head_dim),
          side_of(name, values, parts.data() + num_key_parts, blocks, head_dim),
          own.pages.data(),
          pages.shape(1),
          blocks.sizes[2],
          own.counts.data(),
          require_range("whether the tier is transformed", format[6], 0, 1)};
}

template <class T>
Part book_part_of(const char* name, const Array& array, const Shape& shape) {
  return part_of(name, array, dtype_of<T>(), shape);
}
template Part book_part_of<float>(const char*, const Array&, const Shape&);
template Part book_part_of<int32_t>(const char*, const Array&, const Shape&);

int64_t num_pages(const TierArgument& argument) { return std::get<0>(argument)[0].shape(0); }
int64_t num_rows(const TierArgument& argument) { return std::get<1>(argument).shape(0); }
int64_t capacity(const Tier& tier) { return tier.pages_per_row * tier.blocks_per_page * kBlockTokens; }

void require_slots(const char* name, const Tier& tier, int64_t num_pages, int64_t row, int64_t first, int64_t count) {
  if (first < 0 || first > capacity(tier) || count > capacity(tier) - first) {
    const int64_t stop = first > capacity(tier) ? first : first + count;  // which might not be a number
    refuse(name, ": slots ", first, " to ", stop, " of row ", row, " do not fit into its ", capacity(tier),
           "; grow the tier first");
  }
  if (count <= 0) return;
  const int64_t page_tokens = tier.blocks_per_page * kBlockTokens;
  for (int64_t i = first / page_tokens; i <= (first + count - 1) / page_tokens; ++i) {
    const int64_t page = tier.pages[row * tier.pages_per_row + i];
    if (page < 0 || page >= num_pages) {
      refuse(name, ": pages[", row, ", ", i, "]=", page, " is not one of its ", num_pages, " pages");
    }
  }
}

void require_counts(const char* name, const Tier& tier, int64_t num_pages, int64_t row) {
  const int64_t count = tier.counts[row];
  if (count < 0 || count > capacity(tier)) {
    refuse(name, ": counts[", row, "]=", count, " is not in 0..", capacity(tier));
  }
  require_slots(name, tier, num_pages, row, 0, count);
}

std::pair<Transform, Transform> transforms_of(const TransformArgument& argument, const Shape& shape) {
  const auto& [key_center, key_balancer, value_center, key_rotation, value_rotation] = argument;
  return {transform_of(key_center, key_balancer, key_rotation, shape),
          transform_of(value_center, {}, value_rotation, shape)};
}

const float* feedback_of(const MaybeArray& feedback, const Format& keys, const Shape& shape) {
  if (feedback && !takes_feedback(keys)) {
    refuse("key feedback needs keys of 2, 3 or 4 bits on a grid with one scale per token (lloyd-max, uniform); ",
           "pass none");
  }
  return numbers_of<float>("key feedback", feedback, shape);
}

const uint8_t* mask_of(const MaybeArray& mask, const Shape& shape, int64_t* batch_stride, int64_t* query_stride) {
  *batch_stride = *query_stride = 0;
  if (!mask) return nullptr;
  require_type("mask", *mask, dtype_of<bool>());
  require_axes("mask", *mask, 4);
  Shape expected = shape;
  if (mask->shape(0) == 1) expected.sizes[0] = 1;  // the same for all rows
  require_shape("mask", *mask, expected);
  require_contiguous("mask", *mask, 3);
  if (mask->shape(0) > 1) *batch_stride = mask->stride(0);
  *query_stride = mask->stride(2);
  return static_cast<const uint8_t*>(mask->data());
}

}  // namespace mikv
