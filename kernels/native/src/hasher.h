/* The type mmcache_native.Hasher, and which instruction set it uses. */
#ifndef MMCACHE_NATIVE_HASHER_H
#define MMCACHE_NATIVE_HASHER_H
#include <Python.h>

#include "copy.h"

PyObject *mmcache_hasher_type(void);
void mmcache_hasher_choose(fused_feed *chosen);
#endif
