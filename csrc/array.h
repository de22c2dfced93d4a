// A tensor as an argument: where its numbers are and how they lie, of any dtype, shape and device.
//
// nanobind's own ndarray asks `tensor.__dlpack__()`, 2 microseconds of Python per tensor and 20 tensors per call. DLPack
// 1.2 has a C function for the same, 50 nanoseconds, which PyTorch offers since 2.10; before, ndarray it is.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <utility>

namespace mikv {

class Array {
 public:
  Array() = default;

  // False if `object` is no tensor. Holds on to the object: a list may lose it while kernels run.
  bool assign(nanobind::handle object) noexcept {
    object_ = nanobind::borrow(object);
    if (auto* view = view_function(object)) {
      if (view(object.ptr(), &tensor_) == 0) return true;
      PyErr_Clear();
      return false;
    }
    if (!nanobind::try_cast(object, owner_)) return false;
    tensor_ = {owner_.data(), {owner_.device_type(), owner_.device_id()}, int32_t(owner_.ndim()), owner_.dtype(),
               const_cast<int64_t*>(owner_.shape_ptr()), const_cast<int64_t*>(owner_.stride_ptr()), 0};
    return true;
  }

  void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  bool is_on_cpu() const { return tensor_.device.device_type == nanobind::device::cpu::value; }
  nanobind::dlpack::dtype dtype() const { return tensor_.dtype; }
  size_t ndim() const { return size_t(tensor_.ndim); }
  int64_t shape(size_t axis) const { return tensor_.shape[axis]; }
  int64_t stride(size_t axis) const { return tensor_.strides[axis]; }  // in elements
  bool is_empty() const {
    for (size_t axis = 0; axis < ndim(); ++axis)
      if (shape(axis) == 0) return true;
    return false;
  }
  int64_t size() const {
    if (is_empty()) return 0;  // whose other axes may be of any length
    int64_t product = 1;
    for (size_t axis = 0; axis < ndim(); ++axis) product *= shape(axis);
    return product;
  }

  // The bytes from the first number to the last, whatever the order of the axes.
  std::pair<const char*, const char*> extent() const {
    const int64_t bytes = dtype().bits / 8;
    const char *first = static_cast<const char*>(data()), *last = first;
    if (is_empty()) return {first, first};
    for (size_t axis = 0; axis < ndim(); ++axis) {
      const int64_t reach = (shape(axis) - 1) * stride(axis) * bytes;
      (reach < 0 ? first : last) += reach;
    }
    return {first, last + bytes};
  }

 private:
  using View = int (*)(void* object, nanobind::dlpack::dltensor* view);

  // DLPackExchangeAPI of dlpack.h, up to what is used here
  struct Exchange {
    uint32_t major, minor;
    Exchange* older;
    void* owning[3];
    View view;
  };

  static View view_function(nanobind::handle object) noexcept {
    thread_local PyObject* known_type = nullptr;
    thread_local View known = nullptr;
    PyObject* type = object.type().ptr();
    if (type == known_type) return known;
    PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    auto* exchange = capsule ? static_cast<Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
    PyErr_Clear();
    Py_XDECREF(capsule);  // its type holds on to it
    while (exchange != nullptr && exchange->major != 1) exchange = exchange->older;
    Py_INCREF(type);  // a pointer that is remembered must not come to mean another type
    Py_XDECREF(known_type);
    known_type = type;
    return known = exchange ? exchange->view : nullptr;
  }

  nanobind::object object_;
  nanobind::dlpack::dltensor tensor_;
  nanobind::ndarray<> owner_;
};

}  // namespace mikv

namespace nanobind::detail {

template <>
struct type_caster<mikv::Array> {
  NB_TYPE_CASTER(mikv::Array, const_name("torch.Tensor"))
  bool from_python(handle source, uint8_t, cleanup_list*) noexcept { return !source.is_none() && value.assign(source); }
};

}  // namespace nanobind::detail
