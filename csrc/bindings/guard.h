// What convert's guards compare at each call of a model, thousands of objects by identity: the
// 1,692 of a ResNet-50 take 27 us here where they are in a cache, and 110 us behind a forward; in
// Python it was 750 us, all on a busy EPYC 7003. What differs is compared further by
// fastcnn/convert/graph/guards.py.
#pragma once

#include <pybind11/pybind11.h>

namespace fastcnn {

// The place of the first tuple (dictionary, name, value, ...) from `start` on whose dictionary has
// another object of that name, `missing` standing for none; -1 where there is no such tuple.
Py_ssize_t first_changed(const pybind11::list& values, const pybind11::object& missing,
                         Py_ssize_t start);

// The place of the first dictionary that has no empty dictionary under one of the names, -1 where
// there is none.
Py_ssize_t first_filled(const pybind11::list& dictionaries, const pybind11::tuple& names);

// The place of the first object from `start` on that is not of its type, -1 where there is none.
Py_ssize_t first_of_another_type(const pybind11::list& objects, const pybind11::list& types,
                                 Py_ssize_t start);

}  // namespace fastcnn
