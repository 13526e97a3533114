#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Looks into a livepoint image from Python, by ctypes: no module to install.

    read_image.py IMAGE                lists memory and state, and finds NPB's progress
    read_image.py IMAGE GPA LENGTH     prints guest memory in hexadecimal
"""
import ctypes
import json
import os
import struct
import sys

KIND_SIZE = 72


class Range(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("gpa", ctypes.c_uint64),
                ("bytes", ctypes.c_uint64), ("slot", ctypes.c_uint32),
                ("reserved", ctypes.c_uint32)]


class Section(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("kind", ctypes.c_char * KIND_SIZE),
                ("instance", ctypes.c_uint32), ("version", ctypes.c_uint32),
                ("bytes", ctypes.c_uint64), ("data", ctypes.c_void_p)]


lib = ctypes.CDLL(os.environ.get("LIBLIVEPOINT", "liblivepoint.so.0"))
lib.lvp_error_message.restype = ctypes.c_char_p
for name in ("lvp_image_range_count", "lvp_image_section_count"):
    getattr(lib, name).restype = ctypes.c_size_t
    getattr(lib, name).argtypes = [ctypes.c_void_p]
lib.lvp_image_open.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
lib.lvp_image_free.argtypes = [ctypes.c_void_p]
lib.lvp_image_inspect.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]
lib.lvp_string_free.argtypes = [ctypes.c_void_p]
lib.lvp_image_get_range.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(Range)]
lib.lvp_image_section.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(Section)]
lib.lvp_image_read.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]


class LivepointError(Exception):
    pass


def check(status):
    if status != 0:
        raise LivepointError(f"{lib.lvp_error_message().decode()} (status {status})")


class Image:
    """An open image; a context manager."""

    def __init__(self, path):
        self.handle = ctypes.c_void_p()
        check(lib.lvp_image_open(os.fsencode(path), ctypes.byref(self.handle)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        lib.lvp_image_free(self.handle)
        self.handle = None

    def inspect(self):
        text = ctypes.c_void_p()
        check(lib.lvp_image_inspect(self.handle, ctypes.byref(text)))
        try:
            return json.loads(ctypes.string_at(text))
        finally:
            lib.lvp_string_free(text)

    def ranges(self):
        for index in range(lib.lvp_image_range_count(self.handle)):
            found = Range(struct_size=ctypes.sizeof(Range))
            check(lib.lvp_image_get_range(self.handle, index, ctypes.byref(found)))
            yield found

    def sections(self):
        for index in range(lib.lvp_image_section_count(self.handle)):
            found = Section(struct_size=ctypes.sizeof(Section))
            check(lib.lvp_image_section(self.handle, index, ctypes.byref(found)))
            yield found

    def read(self, gpa, length):
        buffer = ctypes.create_string_buffer(length)
        check(lib.lvp_image_read(self.handle, gpa, buffer, length))
        return buffer.raw


def npb_progress(image):
    """Finds the counter that the NPB guest keeps, and returns it with its address."""
    mark = b"NPB-PROGRESS-V1\0"
    step = 2 << 20
    for found in image.ranges():
        for at in range(found.gpa, found.gpa + found.bytes, step):
            length = min(step, found.gpa + found.bytes - at)
            memory = image.read(at, length)
            place = memory.find(mark)
            while place >= 0:
                iteration, iterations = struct.unpack("<II", image.read(at + place + 16, 8))
                if 0 < iteration <= iterations:
                    return at + place, iteration, iterations
                place = memory.find(mark, place + 1)
    return None


def main(arguments):
    if len(arguments) not in (2, 4):
        sys.exit(__doc__)
    with Image(arguments[1]) as image:
        if len(arguments) == 4:
            print(image.read(int(arguments[2], 0), int(arguments[3], 0)).hex(" "))
            return
        facts = image.inspect()
        print(f"{facts['name']}: {facts['memory_bytes'] >> 20} MiB by {facts['protocol']}")
        for found in image.ranges():
            print(f"memory  slot {found.slot}: {found.bytes:#x} bytes at {found.gpa:#x}")
        for found in image.sections():
            name = f"{found.kind.decode()}.{found.instance}"
            print(f"state   {name}: version {found.version}, {found.bytes} bytes")
        progress = npb_progress(image)
        if progress:
            print("NPB     at %#x: iteration %d of %d" % progress)


if __name__ == "__main__":
    try:
        main(sys.argv)
    except LivepointError as error:
        sys.exit(str(error))
