/* Each store is a few lines of arithmetic around one kernel. sq8 never decodes: with x = least +
 * step * c, the inner product is least * sum(q) + step * <q, c>, one float-by-byte kernel. */
#include "index/store.h"

#include <math.h>
#include <string.h>

#include "storage/base/bytes.h"

#define SQ8_HEADER_BYTES 12u
#define SQ8_LEVELS 255u
#define LEVEL_SLACK 1e-3 /* what normalising in float moves a value, in levels, and to spare */
#define NORM_BYTES 4u

const char *store_name(enum vector_store store)
{
    switch (store) {
    case STORE_F32:
        return "f32";
    case STORE_F16:
        return "f16";
    case STORE_I8:
        return "i8";
    case STORE_U8:
        return "u8";
    case STORE_SQ8:
        return "8bit";
    }
    return "unknown";
}

uint32_t store_vector_bytes(enum vector_store store, enum metric metric, uint32_t dim)
{
    switch (store) {
    case STORE_F32:
        return dim * 4;
    case STORE_F16:
        return dim * 2;
    case STORE_I8:
    case STORE_U8:
        return dim + (metric == METRIC_COSINE ? NORM_BYTES : 0);
    case STORE_SQ8:
        return dim + SQ8_HEADER_BYTES;
    }
    return 0;
}

static float norm_of(const float *vector, uint32_t dim)
{
    double sum = 0;

    for (uint32_t i = 0; i < dim; i++)
        sum += (double)vector[i] * vector[i];
    return (float)sqrt(sum);
}

float vector_normalise(float *vector, uint32_t dim)
{
    float norm = norm_of(vector, dim);

    if (norm > 0) {
        double scale = 1.0 / (double)norm;

        for (uint32_t i = 0; i < dim; i++)
            vector[i] = (float)(vector[i] * scale);
    }
    return norm;
}

/* Whether every value stands on one of the steps + 1 levels between the least and the greatest. */
static bool on_levels(const float *vector, uint32_t dim, float least, double per_level)
{
    for (uint32_t i = 0; i < dim; i++) {
        double level = ((double)vector[i] - (double)least) * per_level;

        if (fabs(level - rint(level)) > LEVEL_SLACK)
            return false;
    }
    return true;
}

/* Levels between the least value and the greatest. Vectors that were bytes once (many models' are)
 * have few distinct values, evenly apart whatever was done to their length: a number of levels that
 * meets them all keeps them as they are. Others miss within the first few values, and get all the
 * levels a byte has. */
static uint32_t levels_of(const float *vector, uint32_t dim, float least, float greatest)
{
    double range = (double)greatest - (double)least;

    for (uint32_t levels = SQ8_LEVELS; levels > 0; levels--)
        if (on_levels(vector, dim, least, levels / range))
            return levels;
    return SQ8_LEVELS;
}

static void encode_sq8(const float *vector, uint32_t dim, uint8_t *out)
{
    float least = vector[0], greatest = vector[0];
    double norm2 = 0;

    for (uint32_t i = 1; i < dim; i++) {
        if (vector[i] < least)
            least = vector[i];
        if (vector[i] > greatest)
            greatest = vector[i];
    }
    uint32_t levels = greatest > least ? levels_of(vector, dim, least, greatest) : SQ8_LEVELS;
    float step = (greatest - least) / (float)levels;

    for (uint32_t i = 0; i < dim; i++) {
        float level = step > 0 ? rintf((vector[i] - least) / step) : 0;
        uint8_t code = level <= 0 ? 0 : level >= SQ8_LEVELS ? SQ8_LEVELS : (uint8_t)level;
        double decoded = (double)least + (double)step * code;

        out[SQ8_HEADER_BYTES + i] = code;
        norm2 += decoded * decoded;
    }
    store_f32(out, least);
    store_f32(out + 4, step);
    store_f32(out + 8, (float)norm2);
}

void store_encode(enum vector_store store, enum metric metric, const float *vector, uint32_t dim,
                  uint8_t *out)
{
    if ((store == STORE_I8 || store == STORE_U8) && metric == METRIC_COSINE) {
        store_f32(out, norm_of(vector, dim));
        out += NORM_BYTES;
    }
    switch (store) {
    case STORE_F32:
        memcpy(out, vector, (size_t)dim * 4);
        break;
    case STORE_F16:
        distance_kernels_best()->f16_from_f32(vector, (uint16_t *)(void *)out, dim);
        break;
    case STORE_U8:
        for (uint32_t i = 0; i < dim; i++)
            out[i] = (uint8_t)vector[i];
        break;
    case STORE_I8:
        for (uint32_t i = 0; i < dim; i++)
            out[i] = (uint8_t)(int8_t)vector[i];
        break;
    case STORE_SQ8:
        encode_sq8(vector, dim, out);
        break;
    }
}

void store_decode(enum vector_store store, enum metric metric, const uint8_t *stored, uint32_t dim,
                  float *vector)
{
    if ((store == STORE_I8 || store == STORE_U8) && metric == METRIC_COSINE)
        stored += NORM_BYTES;
    switch (store) {
    case STORE_F32:
        memcpy(vector, stored, (size_t)dim * 4);
        break;
    case STORE_F16:
        distance_kernels_best()->f32_from_f16((const uint16_t *)(const void *)stored, vector, dim);
        break;
    case STORE_U8:
        for (uint32_t i = 0; i < dim; i++)
            vector[i] = stored[i];
        break;
    case STORE_I8:
        for (uint32_t i = 0; i < dim; i++)
            vector[i] = (int8_t)stored[i];
        break;
    case STORE_SQ8:
        for (uint32_t i = 0; i < dim; i++)
            vector[i] = (float)((double)load_f32(stored) +
                                (double)load_f32(stored + 4) * stored[SQ8_HEADER_BYTES + i]);
        break;
    }
}

/* A query of whole numbers can use the integer kernels, which are exact and several times faster.
 */
static bool query_as_integers(struct store_query *query, const float *raw)
{
    float least = query->store == STORE_U8 ? 0 : -128;
    float greatest = query->store == STORE_U8 ? 255 : 127;

    if (query->store != STORE_U8 && query->store != STORE_I8)
        return false;
    for (uint32_t i = 0; i < query->dim; i++) {
        if (!(raw[i] >= least && raw[i] <= greatest) || raw[i] != rintf(raw[i]))
            return false;
        query->integers[i] = query->store == STORE_U8 ? (uint8_t)raw[i] : (uint8_t)(int8_t)raw[i];
    }
    return true;
}

void store_query_prepare(struct store_query *query, const struct distance_kernels *kernels,
                         enum vector_store store, enum metric metric, uint32_t dim,
                         const float *raw)
{
    query->kernels = kernels;
    query->store = store;
    query->metric = metric;
    query->dim = dim;
    query->is_integer = metric != METRIC_COSINE && query_as_integers(query, raw);
    memcpy(query->vector, raw, (size_t)dim * 4);
    if (metric == METRIC_COSINE)
        vector_normalise(query->vector, dim);

    double sum = 0, norm2 = 0;

    for (uint32_t i = 0; i < dim; i++) {
        sum += query->vector[i];
        norm2 += (double)query->vector[i] * query->vector[i];
    }
    query->sum = (float)sum;
    query->norm2 = (float)norm2;
}

static float distance_integer(const struct store_query *q, const uint8_t *stored)
{
    const struct distance_kernels *k = q->kernels;
    bool is_u8 = q->store == STORE_U8;
    const int8_t *as_i8 = (const int8_t *)stored;

    if (q->metric == METRIC_COSINE) {
        float norm = load_f32(stored);

        stored += NORM_BYTES;
        as_i8 += NORM_BYTES;
        if (norm <= 0)
            return 1;
        return 1 - (is_u8 ? k->ip_f32_u8(q->vector, stored, q->dim)
                          : k->ip_f32_i8(q->vector, as_i8, q->dim)) /
                       norm;
    }
    if (q->is_integer) {
        const int8_t *query_i8 = (const int8_t *)q->integers;

        if (q->metric == METRIC_L2)
            return (float)(is_u8 ? k->l2_u8(q->integers, stored, q->dim)
                                 : k->l2_i8(query_i8, as_i8, q->dim));
        return is_u8 ? -(float)k->ip_u8(q->integers, stored, q->dim)
                     : -(float)k->ip_i8(query_i8, as_i8, q->dim);
    }
    if (q->metric == METRIC_L2)
        return is_u8 ? k->l2_f32_u8(q->vector, stored, q->dim)
                     : k->l2_f32_i8(q->vector, as_i8, q->dim);
    return is_u8 ? -k->ip_f32_u8(q->vector, stored, q->dim)
                 : -k->ip_f32_i8(q->vector, as_i8, q->dim);
}

float store_distance(const struct store_query *q, const uint8_t *stored)
{
    const struct distance_kernels *k = q->kernels;

    switch (q->store) {
    case STORE_U8:
    case STORE_I8:
        return distance_integer(q, stored);
    case STORE_F32: {
        const float *x = (const float *)(const void *)stored;

        if (q->metric == METRIC_L2)
            return k->l2_f32(q->vector, x, q->dim);
        return (q->metric == METRIC_COSINE ? 1.0f : 0.0f) - k->ip_f32(q->vector, x, q->dim);
    }
    case STORE_F16: {
        const uint16_t *x = (const uint16_t *)(const void *)stored;

        if (q->metric == METRIC_L2)
            return k->l2_f32_f16(q->vector, x, q->dim);
        return (q->metric == METRIC_COSINE ? 1.0f : 0.0f) - k->ip_f32_f16(q->vector, x, q->dim);
    }
    case STORE_SQ8: {
        float least = load_f32(stored), step = load_f32(stored + 4), norm2 = load_f32(stored + 8);
        float ip =
            least * q->sum + step * k->ip_f32_u8(q->vector, stored + SQ8_HEADER_BYTES, q->dim);

        if (q->metric == METRIC_L2) {
            float distance = q->norm2 - 2 * ip + norm2;

            return distance > 0 ? distance : 0;
        }
        return (q->metric == METRIC_COSINE ? 1.0f : 0.0f) - ip;
    }
    }
    return INFINITY;
}
