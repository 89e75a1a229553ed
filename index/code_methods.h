/* Code methods: what each code behind quantiser.h provides, one table a kind. Internal to the
 * quantiser: callers use quantiser.h, which checks arguments, drives the pool, adds the byte of the
 * vector's own distortion and holds the stored bytes' header. A code of one kind is chunk_count
 * bytes a vector, each worth one of 256 shares of an estimate. Immutable once trained or read. */
#ifndef ANND_INDEX_CODE_METHODS_H
#define ANND_INDEX_CODE_METHODS_H

#include <stddef.h>
#include <stdint.h>

#include "index/quantiser.h"

#define CODE_TRAIN_ITERATIONS 12u /* Lloyd steps; later ones gain under a percent */

/* Values of a byte of a code. */
#define CODE_VALUES 256u

/* Vectors that encode_block takes at once: enough that widening a code's half floats for them is
 * little work beside the encoding. */
#define CODE_BLOCK 512u

/* Checked by the caller: count >= 256, dim <= DISTANCE_DIM_MAX, refuses(dim, chunk_count) NULL. */
struct code_training {
    const float *sample; /* count x dim */
    uint32_t count;
    uint32_t dim;
    uint32_t chunk_count;
    uint32_t iterations; /* Lloyd steps, where there are any */
    uint64_t seed;
};

struct code_methods {
    enum code_kind kind;
    const char *name;

    /* Why the shape (dim >= 1, chunk_count >= 1) cannot be coded this way, as the end of a
     * sentence, or NULL. */
    const char *(*refuses)(uint32_t dim, uint32_t chunk_count);
    /* Units by which train advances its job; the sample is not looked at. */
    uint64_t (*train_units)(const struct code_training *training);
    int (*train)(const struct code_training *training, struct pool *pool, struct job *job,
                 void **out, struct error *err);
    void (*free)(void *code);
    uint64_t (*memory_bytes)(const void *code);

    size_t (*encode_scratch_floats)(const void *code);
    /* Codes of count <= CODE_BLOCK dense vectors, code_stride bytes apart, of which chunk_count are
     * written; errors, if not NULL, gets the squared distance of each vector to its decoded self.
     */
    void (*encode_block)(const void *code, const float *vectors, uint32_t count, float *scratch,
                         uint8_t *codes, uint64_t code_stride, float *errors);
    void (*decode)(const void *code, const uint8_t *bytes, float *vector);

    size_t (*scratch_floats)(const void *code);
    /* shares: chunk_count x CODE_VALUES, of the squared distance or of minus the inner product. */
    void (*table)(const void *code, enum metric metric, const float *query, float *scratch,
                  float *shares);

    uint64_t (*stored_bytes)(uint32_t dim, uint32_t chunk_count);
    void (*write)(const void *code, uint8_t *bytes);
    /* Reads stored_bytes of them. ERR_CORRUPT where a number cannot have been written. */
    int (*read)(const uint8_t *bytes, uint32_t dim, uint32_t chunk_count, void **out,
                struct error *err);
};

/* `count` little-endian numbers from stored bytes. ERR_CORRUPT when one is not finite; `what` names
 * them. Any thread. */
int code_read_floats(const uint8_t *bytes, size_t count, const char *what, float *out,
                     struct error *err);
int code_read_halves(const uint8_t *bytes, size_t count, const char *what, uint16_t *out,
                     struct error *err);
void code_write_floats(uint8_t *bytes, const float *numbers, size_t count);
void code_write_halves(uint8_t *bytes, const uint16_t *numbers, size_t count);

#endif
