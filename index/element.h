/* element: what one component of a stored vector is, and how two vectors are compared.
 *
 * Both enums are written to disk and never renumbered. Pure functions: any thread. */
#ifndef ANND_INDEX_ELEMENT_H
#define ANND_INDEX_ELEMENT_H

#include <stdint.h>

#include "storage/base/error.h"

enum element_type {
    ELEMENT_F32 = 1,
    ELEMENT_F16 = 2,  /* IEEE 754 binary16 */
    ELEMENT_BF16 = 3, /* the upper half of a float */
    ELEMENT_I8 = 4,
    ELEMENT_U8 = 5,
    ELEMENT_BINARY = 6 /* one bit a dimension, eight to a byte */
};

enum metric {
    METRIC_L2 = 1,    /* squared Euclidean distance: smaller is nearer */
    METRIC_IP = 2,    /* inner product: larger is nearer */
    METRIC_COSINE = 3 /* cosine similarity, -1..1: larger is nearer */
};

/* Bytes of one vector of dim elements, without padding; a started byte of a binary vector counts
 * whole. 0 for a value that is no element type: what came from a file is checked with this. */
uint64_t element_bytes(enum element_type type, uint32_t dim);

/* "f32", "f16", "bf16", "i8", "u8", "binary"; "unknown" otherwise. Static strings. */
const char *element_name(enum element_type type);

/* "L2", "IP", "COSINE"; "unknown" otherwise. Static strings. */
const char *metric_name(enum metric metric);

/* Reads a metric's name in any case. ERR_INVALID names the choices, *out is then untouched. */
int metric_parse(const char *text, enum metric *out, struct error *err);

#endif
