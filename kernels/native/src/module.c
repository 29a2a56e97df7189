/* mmcache_native: copies and hashes many tensors in one call, or one in parts, outside the interpreter's lock.
 *
 * Everything from Python is checked here, before the lock is let go; what moves the bytes is in fused.h.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>

#include "copy.h"
#include "hasher.h"

#define ABI 2 /* of the functions below: raised with any change, and compared by mmcache */

#define MOST_THREADS 16

static fused_copy *chosen = mmcache_copy_plain;
static const char *chosen_name = "baseline";

static void choose(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        chosen = mmcache_copy_avx2;
        mmcache_hasher_choose(mmcache_feed_avx2);
        chosen_name = "avx2";
    }
    if (__builtin_cpu_supports("avx512f")) {
        chosen = mmcache_copy_avx512;
        mmcache_hasher_choose(mmcache_feed_avx512);
        chosen_name = "avx512f";
    }
#endif
}

/* Read one move from its two buffers; -1 with an exception if they do not fit. */
static int read_move(struct move *move, const Py_buffer *source, const Py_buffer *target)
{
    if (target->itemsize != 1 || target->ndim > 2) {
        PyErr_SetString(PyExc_ValueError, "a target must be bytes of one or two dimensions");
        return -1;
    }
    if (source->len != target->len) {
        PyErr_Format(PyExc_ValueError, "a source of %zd bytes for a target of %zd", source->len, target->len);
        return -1;
    }
    move->source = source->buf;
    move->target = target->buf;
    move->rows = 1;
    move->row_nbytes = (size_t)target->len;
    move->stride = 0;
    if (target->ndim == 2) {
        move->rows = (size_t)target->shape[0];
        move->row_nbytes = (size_t)target->shape[1];
        move->stride = target->strides[0];
    }
    Py_ssize_t step = target->ndim ? target->strides[target->ndim - 1] : 1;
    if (move->row_nbytes > 1 && step != 1) {
        PyErr_SetString(PyExc_ValueError, "a target's rows must be contiguous");
        return -1;
    }
    return 0;
}

/* Take hold of every buffer. Returns how many were taken in full; fewer than `count`: an exception is set. */
static Py_ssize_t take(PyObject *sources, PyObject *targets, Py_ssize_t count, Py_buffer *buffers, struct move *moves)
{
    for (Py_ssize_t at = 0; at < count; at++) {
        Py_buffer *source = buffers + 2 * at, *target = source + 1;
        if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(sources, at), source, PyBUF_SIMPLE) < 0)
            return at;
        if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(targets, at), target, PyBUF_STRIDED | PyBUF_WRITABLE) < 0) {
            PyBuffer_Release(source);
            return at;
        }
        if (read_move(moves + at, source, target) < 0) {
            PyBuffer_Release(source);
            PyBuffer_Release(target);
            return at;
        }
    }
    return count;
}

/* What one thread does. */
struct share {
    const struct move *moves;
    size_t count;
    int stream;
    unsigned char *digests;
};

static void *copy_share(void *argument)
{
    const struct share *share = argument;
    chosen(share->moves, share->count, share->stream, share->digests);
    return NULL;
}

/* Copy all moves on up to `threads` threads, each with about as many bytes as the others; those that cannot be had are
 * done without. All have ended when this returns. */
static void copy_on_threads(const struct move *moves, size_t count, int stream, unsigned char *digests, int threads)
{
    struct share shares[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    int begun[MOST_THREADS] = {0}, used = 0;
    size_t total = 0, taken = 0, start = 0;
    for (size_t at = 0; at < count; at++)
        total += moves[at].rows * moves[at].row_nbytes;
    for (size_t at = 0; at < count; at++) {
        taken += moves[at].rows * moves[at].row_nbytes;
        if (at + 1 < count && (used == threads - 1 || taken < total / (size_t)threads * (size_t)(used + 1)))
            continue;
        shares[used++] = (struct share){moves + start, at + 1 - start, stream, digests + 16 * start};
        start = at + 1;
    }
    for (int at = 1; at < used; at++)
        begun[at] = pthread_create(ids + at, NULL, copy_share, shares + at) == 0;
    for (int at = 0; at < used; at++)
        if (!begun[at])
            copy_share(shares + at);
    for (int at = 1; at < used; at++)
        if (begun[at])
            pthread_join(ids[at], NULL);
}

static PyObject *copy_hashed(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *source_list, *target_list, *digests = NULL;
    int stream, threads;
    if (!PyArg_ParseTuple(args, "OOpi:copy_hashed", &source_list, &target_list, &stream, &threads))
        return NULL;
    if (threads < 1 || threads > MOST_THREADS)
        return PyErr_Format(PyExc_ValueError, "%d threads; give 1 to %d", threads, MOST_THREADS);
    PyObject *sources = PySequence_Fast(source_list, "sources must be a sequence");
    PyObject *targets = sources ? PySequence_Fast(target_list, "targets must be a sequence") : NULL;
    if (!targets) {
        Py_XDECREF(sources);
        return NULL;
    }
    Py_ssize_t count = PySequence_Fast_GET_SIZE(sources), taken = 0;
    Py_buffer *buffers = PyMem_Calloc((size_t)count * 2 + 1, sizeof *buffers);
    struct move *moves = PyMem_Calloc((size_t)count + 1, sizeof *moves);
    if (!buffers || !moves) {
        PyErr_NoMemory();
    } else if (PySequence_Fast_GET_SIZE(targets) != count) {
        PyErr_Format(PyExc_ValueError, "%zd sources for %zd targets", count, PySequence_Fast_GET_SIZE(targets));
    } else {
        taken = take(sources, targets, count, buffers, moves);
        if (taken == count)
            digests = PyBytes_FromStringAndSize(NULL, 16 * count);
    }
    if (digests) {
        unsigned char *into = (unsigned char *)PyBytes_AS_STRING(digests);
        Py_BEGIN_ALLOW_THREADS
        copy_on_threads(moves, (size_t)count, stream, into, threads);
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t at = 0; at < 2 * taken; at++)
        PyBuffer_Release(buffers + at);
    PyMem_Free(buffers);
    PyMem_Free(moves);
    Py_DECREF(sources);
    Py_DECREF(targets);
    return digests;
}

static PyMethodDef methods[] = {
    {"copy_hashed", copy_hashed, METH_VARARGS,
     "copy_hashed(sources, targets, stream, threads) -> bytes\n\n"
     "Copy each source to its target and return the xxh3-128 of what was written, 16 bytes each, in order.\n\n"
     "A source is contiguous; a target has as many bytes, in one dimension or in contiguous rows, and does not overlap\n"
     "its source. With `stream` the bytes go past the CPU's caches: for more than those hold. On up to `threads` threads,\n"
     "1 to 16, each tensor on one. Raises ValueError, TypeError or BufferError before anything is written. Releases the\n"
     "interpreter's lock."},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module)
{
    choose();
    PyObject *hasher = mmcache_hasher_type();
    int failed = !hasher || PyModule_AddObjectRef(module, "Hasher", hasher) < 0;
    Py_XDECREF(hasher);
    if (failed || PyModule_AddIntConstant(module, "ABI", ABI) < 0)
        return -1;
    return PyModule_AddStringConstant(module, "INSTRUCTIONS", chosen_name);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "mmcache_native", "Moves bytes for mmcache.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_mmcache_native(void)
{
    return PyModuleDef_Init(&definition);
}
