/* Code methods: what each code behind quantiser.h provides, one table a kind. Internal to the
 * quantiser: callers use quantiser.h, which checks arguments, drives the pool and holds the bytes'
 * header. A code is immutable once trained or read. */
#ifndef ANND_INDEX_CODE_METHODS_H
#define ANND_INDEX_CODE_METHODS_H

#include <stddef.h>
#include <stdint.h>

#include "index/quantiser.h"

#define CODE_TRAIN_ITERATIONS 12u /* Lloyd steps; later ones gain under a percent */

/* Vectors that encode_block takes at once. */
#define CODE_BLOCK 128u

/* Checked by the caller: count >= 256, 1 <= code_bytes <= dim <= DISTANCE_DIM_MAX. */
struct code_training {
    const float *sample; /* count x dim */
    uint32_t count;
    uint32_t dim;
    uint32_t code_bytes;
    uint64_t seed;
};

struct code_methods {
    enum code_kind kind;
    const char *name;

    /* Why the shape cannot be coded this way, as the end of a sentence, or NULL. */
    const char *(*refuses)(uint32_t dim, uint32_t code_bytes);
    /* Units by which train advances its job. */
    uint64_t (*train_units)(uint32_t dim, uint32_t code_bytes);
    int (*train)(const struct code_training *training, struct pool *pool, struct job *job,
                 void **out, struct error *err);
    void (*free)(void *code);
    uint64_t (*memory_bytes)(const void *code);

    size_t (*encode_scratch_floats)(const void *code);
    /* Codes of count <= CODE_BLOCK dense vectors; errors, if not NULL, gets the squared distance
     * of each vector to its decoded self. */
    void (*encode_block)(const void *code, const float *vectors, uint32_t count, float *scratch,
                         uint8_t *codes, float *errors);
    void (*decode)(const void *code, const uint8_t *bytes, float *vector);

    size_t (*table_floats)(const void *code);
    size_t (*scratch_floats)(const void *code);
    void (*table)(const void *code, enum metric metric, const float *query, float *scratch,
                  float *table);
    void (*estimate)(const void *code, const float *table, const uint8_t *codes,
                     const uint32_t *rows, uint32_t count, float *out);

    /* The stored form is floats only, this many; the caller has checked that all are finite. */
    uint64_t (*stored_floats)(uint32_t dim, uint32_t code_bytes);
    void (*write)(const void *code, uint8_t *bytes);
    int (*read)(const uint8_t *bytes, uint32_t dim, uint32_t code_bytes, void **out,
                struct error *err);
};

#endif
