/* mmcache_native.Hasher: one tensor copied and hashed a part at a time, as it comes. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "copy.h"
#include "hasher.h"

#define SHORT 16384 /* bytes: less is done before another thread could have begun */

typedef struct {
    PyObject_HEAD
    XXH3_state_t *state;
    int busy; /* a thread is in here without the interpreter's lock */
} Hasher;

static fused_feed *feed = mmcache_feed_plain;

void mmcache_hasher_choose(fused_feed *chosen)
{
    feed = chosen;
}

static PyObject *new_hasher(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_GET_SIZE(args) || (kwargs && PyDict_GET_SIZE(kwargs)))
        return PyErr_Format(PyExc_TypeError, "Hasher takes no arguments");
    Hasher *self = (Hasher *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->state = XXH3_createState();
    if (!self->state) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    XXH3_128bits_reset(self->state);
    return (PyObject *)self;
}

static void free_hasher(Hasher *self)
{
    PyTypeObject *type = Py_TYPE(self);
    XXH3_freeState(self->state);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Feed what `source` holds, and write it to `target` unless that is NULL; 0, or -1 with an exception. */
static int run(Hasher *self, const Py_buffer *source, const Py_buffer *target, int stream)
{
    if (target && target->len != source->len) {
        PyErr_Format(PyExc_ValueError, "a source of %zd bytes for a target of %zd", source->len, target->len);
        return -1;
    }
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "another thread is using this Hasher; give each its own");
        return -1;
    }
    char *into = target ? target->buf : NULL;
    if (source->len <= SHORT) {
        feed(self->state, source->buf, into, (size_t)source->len, 0);
        return 0;
    }
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    feed(self->state, source->buf, into, (size_t)source->len, stream);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    return 0;
}

static PyObject *copy(PyObject *self, PyObject *args)
{
    Py_buffer source, target;
    int stream;
    if (!PyArg_ParseTuple(args, "y*w*p:copy", &source, &target, &stream))
        return NULL;
    int failed = run((Hasher *)self, &source, &target, stream);
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *update(PyObject *self, PyObject *data)
{
    Py_buffer source;
    if (PyObject_GetBuffer(data, &source, PyBUF_SIMPLE) < 0)
        return NULL;
    int failed = run((Hasher *)self, &source, NULL, 0);
    PyBuffer_Release(&source);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *take(PyObject *object, PyObject *Py_UNUSED(none))
{
    Hasher *self = (Hasher *)object;
    unsigned char digest[16];
    if (self->busy)
        return PyErr_Format(PyExc_RuntimeError, "another thread is using this Hasher; give each its own");
    XXH128_canonicalFromHash((XXH128_canonical_t *)digest, XXH3_128bits_digest(self->state));
    XXH3_128bits_reset(self->state);
    return PyBytes_FromStringAndSize((const char *)digest, sizeof digest);
}

static PyMethodDef methods[] = {
    {"copy", copy, METH_VARARGS,
     "copy(source, target, stream)\n\nCopy all of the source to the target, of as many bytes, and hash what was written."},
    {"update", update, METH_O, "update(data)\n\nHash what lies there."},
    {"take", take, METH_NOARGS, "take() -> bytes\n\nThe xxh3-128 of all since the last take, 16 bytes; and begin anew."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new_hasher},
    {Py_tp_dealloc, free_hasher},
    {Py_tp_methods, methods},
    {Py_tp_doc, "The xxh3-128 of what is copied or looked at a part at a time. Releases the interpreter's lock."},
    {0, NULL},
};
static PyType_Spec spec = {"mmcache_native.Hasher", sizeof(Hasher), 0, Py_TPFLAGS_DEFAULT, slots};

PyObject *mmcache_hasher_type(void)
{
    return PyType_FromSpec(&spec);
}
