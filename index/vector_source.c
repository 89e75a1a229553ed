/* How it works: a source is an open vector_file or a borrowed array behind the same four facts.
 * Conversion to float needs no second buffer: an element is never wider than a float, so rows are
 * read into the end of the caller's array and widened from its front, where the value written at i
 * never reaches past the one read at i. */
#include "index/vector_source.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/vector_file.h"
#include "storage/base/bytes.h"

struct vector_source {
    struct vector_file *file; /* NULL: rows are at data */
    const uint8_t *data;
    char *name;
    enum element_type type;
    uint64_t rows;
    uint32_t dim;
    uint32_t row_bytes;
};

int vector_source_open(struct vfs *vfs, const char *path, struct vector_source **out,
                       struct error *err)
{
    struct vector_source *source = calloc(1, sizeof *source);
    int rc = -1;

    if (!source || !(source->name = strdup(path))) {
        error_set(err, ERR_NOMEM, "%s: no memory to open it", path);
        goto done;
    }
    if (vector_file_open(vfs, path, &source->file, err) < 0)
        goto done;
    source->type = source->file->type;
    source->rows = source->file->rows;
    source->dim = source->file->dim;
    source->row_bytes = source->file->row_bytes;
    *out = source;
    source = NULL; /* moved to the caller */
    rc = 0;
done:
    vector_source_close(source);
    return rc;
}

int vector_source_open_memory(const void *data, enum element_type type, uint64_t rows, uint32_t dim,
                              const char *name, struct vector_source **out, struct error *err)
{
    uint64_t row_bytes = element_bytes(type, dim);
    struct vector_source *source;

    if (!rows || !row_bytes || dim > VECTOR_FILE_DIM_MAX)
        return error_set(err, ERR_INVALID,
                         "%s: %" PRIu64 " rows of %u x %s, wanted at least one row of dimension "
                         "1 to %u",
                         name, rows, dim, element_name(type), VECTOR_FILE_DIM_MAX);
    source = calloc(1, sizeof *source);
    if (!source || !(source->name = strdup(name))) {
        free(source);
        return error_set(err, ERR_NOMEM, "%s: no memory to open it", name);
    }
    source->data = data;
    source->type = type;
    source->rows = rows;
    source->dim = dim;
    source->row_bytes = (uint32_t)row_bytes;
    *out = source;
    return 0;
}

void vector_source_close(struct vector_source *source)
{
    if (!source)
        return;
    vector_file_close(source->file);
    free(source->name);
    free(source);
}

const char *vector_source_name(const struct vector_source *source)
{
    return source->name;
}

enum element_type vector_source_type(const struct vector_source *source)
{
    return source->type;
}

uint64_t vector_source_rows(const struct vector_source *source)
{
    return source->rows;
}

uint32_t vector_source_dim(const struct vector_source *source)
{
    return source->dim;
}

uint32_t vector_source_row_bytes(const struct vector_source *source)
{
    return source->row_bytes;
}

int vector_source_read(const struct vector_source *source, uint64_t first_row, uint64_t count,
                       void *out, struct error *err)
{
    if (source->file)
        return vector_file_read(source->file, first_row, count, out, err);
    if (first_row > source->rows || count > source->rows - first_row)
        return error_set(err, ERR_INVALID,
                         "%s: %" PRIu64 " rows from %" PRIu64 " on wanted, it has %" PRIu64,
                         source->name, count, first_row, source->rows);
    if (count)
        memcpy(out, source->data + first_row * source->row_bytes, count * source->row_bytes);
    return 0;
}

/* IEEE binary16: the exponent is moved by a multiplication, which is exact and gets subnormals
 * right; infinity and NaN are set apart. */
static float half_to_float(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float value = load_f32(&bits);

    if ((half & 0x7c00) == 0x7c00) {
        bits |= 0x7f800000;
    } else {
        value *= 0x1p112f;
        memcpy(&bits, &value, sizeof bits);
    }
    bits |= sign;
    return load_f32(&bits);
}

int vector_source_read_f32(const struct vector_source *source, uint64_t first_row, uint64_t count,
                           float *out, struct error *err)
{
    uint64_t values = count * source->dim;
    uint8_t *raw;

    if (source->type == ELEMENT_F32)
        return vector_source_read(source, first_row, count, out, err);
    if (source->type == ELEMENT_BINARY)
        return error_set(err, ERR_UNSUPPORTED, "%s: binary vectors have no float form",
                         source->name);
    if (first_row > source->rows || count > source->rows - first_row)
        return vector_source_read(source, first_row, count, out, err); /* says what is wrong */
    raw = (uint8_t *)(out + values) - count * source->row_bytes;
    if (vector_source_read(source, first_row, count, raw, err) < 0)
        return -1;
    for (uint64_t i = 0; i < values; i++) {
        uint32_t bits;

        switch (source->type) {
        case ELEMENT_U8:
            out[i] = raw[i];
            break;
        case ELEMENT_I8:
            out[i] = (int8_t)raw[i];
            break;
        case ELEMENT_F16:
            out[i] = half_to_float(load_u16(raw + 2 * i));
            break;
        default: /* ELEMENT_BF16 */
            bits = (uint32_t)load_u16(raw + 2 * i) << 16;
            out[i] = load_f32(&bits);
            break;
        }
    }
    return 0;
}

/* Index of the first value whose exponent bits are all ones, or `count`. Bits, not isfinite():
 * this must hold whatever -ffast-math a build adds, and is one pass of integer compares. */
static uint64_t first_nonfinite_32(const uint8_t *p, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        if ((load_u32(p + 4 * i) & 0x7f800000) == 0x7f800000)
            return i;
    return count;
}

static uint64_t first_nonfinite_16(const uint8_t *p, uint64_t count, uint16_t exponent)
{
    for (uint64_t i = 0; i < count; i++)
        if ((load_u16(p + 2 * i) & exponent) == exponent)
            return i;
    return count;
}

int vector_source_check(const struct vector_source *source, const void *rows, uint64_t first_row,
                        uint64_t count, struct error *err)
{
    uint64_t values = count * source->dim, bad = values;
    struct error local = ERROR_INIT;

    switch (source->type) {
    case ELEMENT_F32:
        if (vector_check_finite(rows, first_row, count, source->dim, &local) < 0)
            return error_set(err, ERR_INVALID, "%s: %s", source->name, local.message);
        return 0;
    case ELEMENT_F16:
        bad = first_nonfinite_16(rows, values, 0x7c00);
        break;
    case ELEMENT_BF16:
        bad = first_nonfinite_16(rows, values, 0x7f80);
        break;
    default:
        break;
    }
    if (bad == values)
        return 0;
    return error_set(err, ERR_INVALID,
                     "%s: row %" PRIu64 " has NaN or infinity in dimension %" PRIu64, source->name,
                     first_row + bad / source->dim, bad % source->dim);
}

int vector_check_finite(const float *rows, uint64_t first_row, uint64_t count, uint32_t dim,
                        struct error *err)
{
    uint64_t bad = first_nonfinite_32((const uint8_t *)rows, count * dim);

    if (bad == count * dim)
        return 0;
    return error_set(err, ERR_INVALID, "row %" PRIu64 " has %s in dimension %" PRIu64,
                     first_row + bad / dim, isnan(rows[bad]) ? "NaN" : "infinity", bad % dim);
}
