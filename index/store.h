/* store: how one vector is kept on a page, and how it is scored there against a query.
 *
 * f32 and f16 keep floats, u8 and i8 integers as they are; sq8 keeps a byte a dimension between the
 * vector's own least and greatest value (Aguerrebere et al., "Similarity search in the blink of an
 * eye with compressed indices", 2023, without their mean removal); vectors whose values stand on
 * 256 levels or fewer, evenly apart, are kept as they are, to float rounding. For cosine, floats
 * are normalised before they are stored and integers carry their norm. Bytes of one vector:
 *
 *   f32, f16     dim elements
 *   u8, i8       cosine: f32 norm first; then dim elements
 *   sq8          f32 least, f32 step, f32 squared norm of the decoded vector; then dim bytes
 *
 * Distances are smaller-is-nearer: squared L2, minus the inner product, 1 - cosine. */
#ifndef ANND_INDEX_STORE_H
#define ANND_INDEX_STORE_H

#include <stdbool.h>
#include <stdint.h>

#include "index/distance.h"
#include "index/element.h"
#include "storage/base/error.h"

enum vector_store { /* on disk */
                    STORE_F32 = 1,
                    STORE_F16 = 2,
                    STORE_I8 = 4,
                    STORE_U8 = 5,
                    STORE_SQ8 = 16
};

const char *store_name(enum vector_store store);
/* 0 for a value that is no store. */
uint32_t store_vector_bytes(enum vector_store store, enum metric metric, uint32_t dim);

/* Floats to stored bytes; the vector is normalised already where the metric wants it. Integer
 * stores take whole numbers in range. */
void store_encode(enum vector_store store, enum metric metric, const float *vector, uint32_t dim,
                  uint8_t *out);
/* Back to dim floats (normalised ones stay so). */
void store_decode(enum vector_store store, enum metric metric, const uint8_t *stored, uint32_t dim,
                  float *vector);

/* A query made ready for one store and metric. Buffers belong to the caller. */
struct store_query {
    const struct distance_kernels *kernels;
    enum vector_store store;
    enum metric metric;
    uint32_t dim;
    float *vector;     /* dim floats; normalised for cosine */
    uint8_t *integers; /* dim bytes: the query as u8 or i8, when it is whole numbers in range */
    bool is_integer;
    float sum;   /* of the components */
    float norm2; /* squared norm of `vector` */
};

/* vector and integers must point at dim floats and dim bytes of scratch. */
void store_query_prepare(struct store_query *query, const struct distance_kernels *kernels,
                         enum vector_store store, enum metric metric, uint32_t dim,
                         const float *raw);
float store_distance(const struct store_query *query, const uint8_t *stored);

/* Divides by the norm; a zero vector stays zero. Returns the norm. */
float vector_normalise(float *vector, uint32_t dim);

#endif
