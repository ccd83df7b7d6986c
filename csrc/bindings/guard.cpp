#include "bindings/guard.h"

namespace fastcnn {

Py_ssize_t first_changed(const pybind11::list& values, const pybind11::object& missing,
                         Py_ssize_t start) {
  const Py_ssize_t count = PyList_Size(values.ptr());
  for (Py_ssize_t at = start; at < count; ++at) {
    PyObject* value = PyList_GetItem(values.ptr(), at);
    PyObject* holder = PyTuple_GetItem(value, 0);
    PyObject* name = holder == nullptr ? nullptr : PyTuple_GetItem(value, 1);
    PyObject* then = name == nullptr ? nullptr : PyTuple_GetItem(value, 2);
    if (then == nullptr) throw pybind11::error_already_set();
    PyObject* now = PyDict_GetItemWithError(holder, name);
    if (now == nullptr && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    if ((now == nullptr ? missing.ptr() : now) != then) return at;
  }
  return -1;
}

Py_ssize_t first_filled(const pybind11::list& dictionaries, const pybind11::tuple& names) {
  const Py_ssize_t count = PyList_Size(dictionaries.ptr()), wide = PyTuple_Size(names.ptr());
  for (Py_ssize_t at = 0; at < count; ++at) {
    PyObject* holder = PyList_GetItem(dictionaries.ptr(), at);
    for (Py_ssize_t i = 0; i < wide; ++i) {
      PyObject* inner = PyDict_GetItemWithError(holder, PyTuple_GetItem(names.ptr(), i));
      if (inner == nullptr && PyErr_Occurred() == nullptr) return at;
      const Py_ssize_t size = inner == nullptr ? -1 : PyDict_Size(inner);
      if (size < 0) throw pybind11::error_already_set();
      if (size > 0) return at;
    }
  }
  return -1;
}

Py_ssize_t first_of_another_type(const pybind11::list& objects, const pybind11::list& types,
                                 Py_ssize_t start) {
  const Py_ssize_t count = PyList_Size(objects.ptr());
  if (PyList_Size(types.ptr()) != count) {
    throw pybind11::value_error("expected a type for each object");
  }
  for (Py_ssize_t at = start; at < count; ++at) {
    PyObject* type = PyList_GetItem(types.ptr(), at);
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyList_GetItem(objects.ptr(), at))) != type) return at;
  }
  return -1;
}

}  // namespace fastcnn
