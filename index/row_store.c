/* How it works: "rows" is raw rows, each followed by its CRC-32C. Records are read into a buffer
 * (small reads, of single rows above all, into one on the stack), checked, and leave it converted.
 * "leaves" is small and read whole:
 *
 *   00-07  "ANNDLEAF"
 *   08-11  version
 *   12-15  CRC-32C of the file, this field as zero
 *   16-19  rows
 *   20-23  leaves
 *   24-27  dimension of the input
 *   28-31  dimension of the space
 *   32-35  metric
 *   36-39  element type
 *   40-43  norm_max
 *   44-47  leaves a group
 *   48-63  zero
 *   then leaf_begins, then centroids
 *
 * Rows may become space rows in place: a raw row is never longer than its space row, so a block
 * that lies at the end of the room for it is converted from the front, each row being moved to its
 * place and widened from its last element on. */
#include "index/row_store.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "index/block_products.h"
#include "index/store.h"
#include "storage/base/bytes.h"
#include "storage/file.h"

#define LEAVES_VERSION 1u
#define HEADER_BYTES 64u
#define HOLD_BYTES (1u << 20) /* read by one worker at once */
#define HUGE_BYTES (2u << 20)
#define STACK_BYTES (16u << 10) /* read without a buffer on the heap */

static const char leaves_magic[8] = {'A', 'N', 'N', 'D', 'L', 'E', 'A', 'F'};

enum leaves_header {
    AT_MAGIC = 0,
    AT_VERSION = 8,
    AT_CRC = 12,
    AT_COUNT = 16,
    AT_LEAVES = 20,
    AT_DIM = 24,
    AT_SPACE_DIM = 28,
    AT_METRIC = 32,
    AT_ELEMENT = 36,
    AT_NORM_MAX = 40,
    AT_GROUP = 44
};

/* ---- shapes ---- */

void row_shape_init(struct row_shape *shape, enum metric metric, enum element_type element,
                    uint32_t dim)
{
    *shape = (struct row_shape){.metric = metric, .element = element, .dim = dim};
    shape->raw_bytes = element_bytes(element, dim);
    shape->space_type = metric == METRIC_L2 ? element : ELEMENT_F32;
    shape->space_dim = metric == METRIC_IP ? dim + 1 : dim;
    shape->stride = block_row_stride(shape->space_type, shape->space_dim);
}

/* `dim` elements at `row` become as many floats there. */
static void widen(enum element_type element, uint32_t dim, uint8_t *row)
{
    if (element == ELEMENT_U8)
        for (uint32_t d = dim; d-- > 0;)
            store_f32(row + 4ull * d, row[d]);
    else if (element == ELEMENT_I8)
        for (uint32_t d = dim; d-- > 0;)
            store_f32(row + 4ull * d, (int8_t)row[d]);
}

void row_shape_convert(const struct row_shape *shape, const uint8_t *raw, uint64_t count,
                       uint8_t *space)
{
    uint64_t space_bytes = element_bytes(shape->space_type, shape->space_dim);

    for (uint64_t i = 0; i < count; i++) {
        uint8_t *row = space + i * shape->stride;
        float *vector = (float *)(void *)row;

        memmove(row, raw + i * shape->raw_bytes, shape->raw_bytes);
        if (shape->metric != METRIC_L2)
            widen(shape->element, shape->dim, row);
        if (shape->metric == METRIC_COSINE)
            vector_normalise(vector, shape->dim);
        if (shape->metric == METRIC_IP) {
            double sum = 0, rest;

            for (uint32_t d = 0; d < shape->dim; d++)
                sum += (double)vector[d] * vector[d];
            rest = (double)shape->norm_max * shape->norm_max - sum;
            vector[shape->dim] = rest > 0 ? (float)sqrt(rest) : 0;
        }
        memset(row + space_bytes, 0, shape->stride - space_bytes);
    }
}

void row_shape_floats(const struct row_shape *shape, const uint8_t *space_row, float *out)
{
    if (shape->space_type == ELEMENT_F32)
        memcpy(out, space_row, shape->dim * sizeof *out);
    else if (shape->space_type == ELEMENT_U8)
        for (uint32_t d = 0; d < shape->dim; d++)
            out[d] = space_row[d];
    else
        for (uint32_t d = 0; d < shape->dim; d++)
            out[d] = (int8_t)space_row[d];
}

/* ---- leaves ---- */

static uint64_t leaves_bytes(uint32_t leaf_count, uint32_t space_dim)
{
    return HEADER_BYTES + (leaf_count + 1ull) * sizeof(uint32_t) +
           (uint64_t)leaf_count * space_dim * sizeof(float);
}

int row_store_write_leaves(struct vfs *vfs, const char *folder, const struct row_shape *shape,
                           uint32_t count, uint32_t leaf_count, const uint32_t *leaf_begins,
                           const float *centroids, struct error *err)
{
    uint64_t bytes = leaves_bytes(leaf_count, shape->space_dim);
    uint64_t begins_bytes = (leaf_count + 1ull) * sizeof *leaf_begins;
    uint8_t *data = calloc(1, bytes);
    char path[FILE_PATH_MAX];
    int rc = -1;

    if (!data) {
        error_set(err, ERR_NOMEM, "no memory to write %u centroids", leaf_count);
        goto done;
    }
    memcpy(data + AT_MAGIC, leaves_magic, sizeof leaves_magic);
    store_u32(data + AT_VERSION, LEAVES_VERSION);
    store_u32(data + AT_COUNT, count);
    store_u32(data + AT_LEAVES, leaf_count);
    store_u32(data + AT_DIM, shape->dim);
    store_u32(data + AT_SPACE_DIM, shape->space_dim);
    store_u32(data + AT_METRIC, (uint32_t)shape->metric);
    store_u32(data + AT_ELEMENT, (uint32_t)shape->element);
    store_f32(data + AT_NORM_MAX, shape->norm_max);
    store_u32(data + AT_GROUP, ROW_STORE_GROUP);
    memcpy(data + HEADER_BYTES, leaf_begins, begins_bytes);
    memcpy(data + HEADER_BYTES + begins_bytes, centroids, bytes - HEADER_BYTES - begins_bytes);
    store_u32(data + AT_CRC, crc32c(0, data, bytes));
    if (file_path_join(path, folder, "leaves", err) < 0)
        goto done;
    rc = file_publish(vfs, path, data, bytes, err);
done:
    free(data);
    return rc;
}

static int leaves_check(uint8_t *data, uint64_t bytes, const struct row_shape *shape,
                        uint32_t count, const char *path, struct error *err)
{
    uint32_t crc, leaf_count, before = 0;

    if (bytes < HEADER_BYTES || memcmp(data + AT_MAGIC, leaves_magic, sizeof leaves_magic) != 0 ||
        load_u32(data + AT_VERSION) != LEAVES_VERSION)
        return error_set(err, ERR_CORRUPT, "%s is no list of leaves of version %u", path,
                         LEAVES_VERSION);
    crc = load_u32(data + AT_CRC);
    store_u32(data + AT_CRC, 0);
    if (crc32c(0, data, bytes) != crc)
        return error_set(err, ERR_CORRUPT, "%s: CRC-32C %08x, wanted %08x", path,
                         crc32c(0, data, bytes), crc);
    leaf_count = load_u32(data + AT_LEAVES);
    if (load_u32(data + AT_COUNT) != count || load_u32(data + AT_DIM) != shape->dim ||
        load_u32(data + AT_SPACE_DIM) != shape->space_dim ||
        load_u32(data + AT_METRIC) != (uint32_t)shape->metric ||
        load_u32(data + AT_ELEMENT) != (uint32_t)shape->element ||
        load_u32(data + AT_GROUP) != ROW_STORE_GROUP ||
        load_f32(data + AT_NORM_MAX) != shape->norm_max)
        return error_set(err, ERR_CORRUPT, "%s is of %u rows of %u dimensions, or of another space",
                         path, load_u32(data + AT_COUNT), load_u32(data + AT_DIM));
    if (leaf_count == 0 || leaves_bytes(leaf_count, shape->space_dim) != bytes)
        return error_set(err, ERR_CORRUPT, "%s: %" PRIu64 " bytes do not hold %u leaves", path,
                         bytes, leaf_count);
    for (uint32_t i = 0; i <= leaf_count; i++) {
        uint32_t begin = load_u32(data + HEADER_BYTES + 4ull * i);

        if (begin < before || begin > count || (i == 0 && begin != 0) ||
            (i == leaf_count && begin != count))
            return error_set(err, ERR_CORRUPT, "%s: leaf %u begins at %u after %u, of %u rows",
                             path, i, begin, before, count);
        before = begin;
    }
    return 0;
}

static int leaves_read(struct vfs *vfs, const char *folder, struct row_store *store,
                       struct error *err)
{
    struct error read_err = ERROR_INIT;
    char path[FILE_PATH_MAX];
    uint8_t *data = NULL;
    uint64_t begins_bytes, centroids_bytes;
    size_t bytes;
    int rc = -1;

    if (file_path_join(path, folder, "leaves", err) < 0)
        return -1;
    if (file_read_whole(vfs, path, leaves_bytes(store->count, store->shape.space_dim), &data,
                        &bytes, &read_err) < 0) {
        bool damaged = read_err.code == ERR_INVALID || read_err.code == ERR_NOT_FOUND;

        error_set(err, damaged ? ERR_CORRUPT : read_err.code, "%s", read_err.message);
        goto done;
    }
    if (leaves_check(data, bytes, &store->shape, store->count, path, err) < 0)
        goto done;
    store->leaf_count = load_u32(data + AT_LEAVES);
    store->group_count = (store->leaf_count + ROW_STORE_GROUP - 1) / ROW_STORE_GROUP;
    begins_bytes = (store->leaf_count + 1ull) * sizeof *store->leaf_begins;
    centroids_bytes = bytes - HEADER_BYTES - begins_bytes;
    store->leaf_begins = malloc(begins_bytes);
    store->centroids = malloc(centroids_bytes);
    if (!store->leaf_begins || !store->centroids) {
        error_set(err, ERR_NOMEM, "no memory for %u centroids", store->leaf_count);
        goto done;
    }
    memcpy(store->leaf_begins, data + HEADER_BYTES, begins_bytes);
    memcpy(store->centroids, data + HEADER_BYTES + begins_bytes, centroids_bytes);
    rc = 0;
done:
    free(data);
    return rc;
}

/* ---- numbers ---- */

struct vfs_file *row_store_open_scratch(struct vfs *vfs, const char *path, unsigned flags,
                                        struct error *err)
{
    struct error open_err = ERROR_INIT;
    struct vfs_file *file = file_open(vfs, path, flags, &open_err);

    if (!file)
        error_set(err, open_err.code == ERR_NOT_FOUND ? ERR_CORRUPT : open_err.code, "%s",
                  open_err.message);
    return file;
}

static int numbers_check(const uint32_t *numbers, uint32_t count, const char *path,
                         struct error *err)
{
    uint64_t bytes = (uint64_t)count * sizeof *numbers;
    uint32_t crc = crc32c(0, numbers, bytes);
    uint8_t *seen;
    int rc = -1;

    if (crc != numbers[count])
        return error_set(err, ERR_CORRUPT, "%s: CRC-32C %08x of %" PRIu64 " bytes, wanted %08x",
                         path, crc, bytes, numbers[count]);
    seen = calloc(count / 8 + 1ull, 1);
    if (!seen)
        return error_set(err, ERR_NOMEM, "no memory to check %u row numbers", count);
    for (uint32_t place = 0; place < count; place++) {
        uint32_t row = numbers[place];

        if (row >= count || (seen[row / 8] & (1u << row % 8))) {
            error_set(err, ERR_CORRUPT, "%s: place %u has row %u, %s", path, place, row,
                      row >= count ? "which there is not" : "as another place has");
            goto done;
        }
        seen[row / 8] |= (uint8_t)(1u << row % 8);
    }
    rc = 0;
done:
    free(seen);
    return rc;
}

int row_store_read_numbers(struct vfs *vfs, const char *folder, uint32_t count, uint32_t **out,
                           struct error *err)
{
    uint64_t wanted = (count + 1ull) * sizeof **out, bytes;
    uint32_t *numbers = malloc(wanted);
    struct vfs_file *file = NULL;
    char path[FILE_PATH_MAX];
    int rc = -1;

    if (!numbers) {
        error_set(err, ERR_NOMEM, "no memory for %u row numbers", count);
        goto done;
    }
    if (file_path_join(path, folder, "numbers", err) < 0)
        goto done;
    file = row_store_open_scratch(vfs, path, VFS_READ, err);
    if (!file || file_size(file, path, &bytes, err) < 0)
        goto done;
    if (bytes != wanted) {
        error_set(err, ERR_CORRUPT, "%s has %" PRIu64 " bytes, %" PRIu64 " were wanted", path,
                  bytes, wanted);
        goto done;
    }
    if (file_read_exact(file, path, numbers, wanted, 0, err) < 0 ||
        numbers_check(numbers, count, path, err) < 0)
        goto done;
    *out = numbers;
    numbers = NULL; /* moved to the caller */
    rc = 0;
done:
    file_close(file, path, NULL);
    free(numbers);
    return rc;
}

/* ---- the store ---- */

uint32_t row_store_crc(const struct row_shape *shape, uint32_t place, const uint8_t *raw)
{
    return crc32c(place, raw, shape->raw_bytes);
}

int row_store_open(struct vfs *vfs, const char *folder, const struct row_shape *shape,
                   uint32_t count, struct row_store **out, struct error *err)
{
    struct row_store *store = calloc(1, sizeof *store);
    char path[FILE_PATH_MAX];
    uint64_t bytes;
    int rc = -1;

    if (!store) {
        error_set(err, ERR_NOMEM, "no memory for a store of rows");
        goto done;
    }
    store->shape = *shape;
    store->count = count;
    if (leaves_read(vfs, folder, store, err) < 0 || file_path_join(path, folder, "rows", err) < 0)
        goto done;
    store->path = strdup(path);
    if (!store->path) {
        error_set(err, ERR_NOMEM, "no memory for a store of rows");
        goto done;
    }
    store->file = row_store_open_scratch(vfs, path, VFS_READ, err);
    if (!store->file || file_size(store->file, path, &bytes, err) < 0)
        goto done;
    if (bytes != count * row_store_record_bytes(shape)) {
        error_set(err, ERR_CORRUPT,
                  "%s has %" PRIu64 " bytes, %u rows of %" PRIu64 " bytes were wanted", path, bytes,
                  count, row_store_record_bytes(shape));
        goto done;
    }
    *out = store;
    store = NULL; /* moved to the caller */
    rc = 0;
done:
    row_store_close(store);
    return rc;
}

void row_store_close(struct row_store *store)
{
    if (!store)
        return;
    row_store_drop(store);
    file_close(store->file, store->path, NULL);
    free(store->leaf_begins);
    free(store->centroids);
    free(store->path);
    free(store);
}

static int range_check(const struct row_store *store, uint32_t first, uint32_t count,
                       struct error *err)
{
    if (first > store->count || count > store->count - first)
        return error_set(err, ERR_INVALID, "%s: %u rows from %u on wanted, it has %u", store->path,
                         count, first, store->count);
    return 0;
}

/* Records of places [first, first + count) into `buffer`, checked. */
static int read_records(const struct row_store *store, uint32_t first, uint32_t count,
                        uint8_t *buffer, struct error *err)
{
    uint64_t record = row_store_record_bytes(&store->shape);

    if (file_read_exact(store->file, store->path, buffer, count * record, first * record, err) < 0)
        return -1;
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *raw = buffer + i * record;
        uint32_t wanted = load_u32(raw + store->shape.raw_bytes);
        uint32_t crc = row_store_crc(&store->shape, first + i, raw);

        if (crc != wanted)
            return error_set(err, ERR_CORRUPT,
                             "%s: row at place %u (byte %" PRIu64 "): CRC-32C %08x, wanted %08x",
                             store->path, first + i, (first + i) * record, crc, wanted);
    }
    return 0;
}

/* From the file, whatever is held: space rows, or raw ones. */
static int read_rows(const struct row_store *store, uint32_t first, uint32_t count, bool to_space,
                     uint8_t *out, struct error *err)
{
    const struct row_shape *shape = &store->shape;
    uint64_t record = row_store_record_bytes(shape), room = count * record;
    uint8_t stack[STACK_BYTES], *heap = NULL, *buffer = stack;
    uint32_t at_once;
    int rc = -1;

    if (range_check(store, first, count, err) < 0)
        return -1;
    if (room > sizeof stack) {
        room = room < ROW_STORE_READ_BYTES ? room : ROW_STORE_READ_BYTES;
        room = room < record ? record : room;
        heap = malloc(room);
        if (!heap)
            return error_set(err, ERR_NOMEM, "no memory to read rows of %s", store->path);
        buffer = heap;
    }
    at_once = (uint32_t)(room / record);
    for (uint64_t done = 0; done < count; done += at_once) {
        uint32_t rows = count - done < at_once ? (uint32_t)(count - done) : at_once;

        if (read_records(store, first + (uint32_t)done, rows, buffer, err) < 0)
            goto done;
        for (uint32_t i = 0; i < rows; i++) {
            const uint8_t *raw = buffer + i * record;

            if (to_space)
                row_shape_convert(shape, raw, 1, out + (done + i) * shape->stride);
            else
                memcpy(out + (done + i) * shape->raw_bytes, raw, shape->raw_bytes);
        }
    }
    rc = 0;
done:
    free(heap);
    return rc;
}

int row_store_read_raw(const struct row_store *store, uint32_t first, uint32_t count, uint8_t *raw,
                       struct error *err)
{
    return read_rows(store, first, count, false, raw, err);
}

int row_store_read(const struct row_store *store, uint32_t first, uint32_t count, uint8_t *space,
                   struct error *err)
{
    if (!store->resident)
        return read_rows(store, first, count, true, space, err);
    if (range_check(store, first, count, err) < 0)
        return -1;
    memcpy(space, store->resident + first * store->shape.stride, count * store->shape.stride);
    return 0;
}

struct hold {
    const struct row_store *store;
    uint8_t *space;
    struct error *errors; /* a worker's first */
};

static void hold_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct hold *h = context;

    if (h->errors[worker].code == ERR_NONE)
        read_rows(h->store, (uint32_t)begin, (uint32_t)(end - begin), true,
                  h->space + begin * h->store->shape.stride, &h->errors[worker]);
}

int row_store_hold(struct row_store *store, struct pool *pool, struct error *err)
{
    uint64_t bytes = align_up(store->count * store->shape.stride, HUGE_BYTES);
    uint64_t grain = HOLD_BYTES / store->shape.stride ? HOLD_BYTES / store->shape.stride : 1;
    uint32_t workers = pool_workers(pool);
    struct hold h = {.store = store, .errors = calloc(workers, sizeof *h.errors)};
    void *space = NULL;
    int rc = -1;

    if (store->resident) {
        rc = 0;
        goto done;
    }
    if (!h.errors || posix_memalign(&space, HUGE_BYTES, bytes) != 0) {
        error_set(err, ERR_NOMEM, "no memory to hold %u rows, %" PRIu64 " bytes", store->count,
                  bytes);
        goto done;
    }
    madvise(space, bytes, MADV_HUGEPAGE); /* advice: nothing depends on it */
    h.space = space;
    pool_for(pool, store->count, grain, hold_range, &h);
    for (uint32_t i = 0; i < workers; i++) {
        if (h.errors[i].code == ERR_NONE)
            continue;
        error_set(err, h.errors[i].code, "%s", h.errors[i].message);
        goto done;
    }
    store->resident = space;
    space = NULL; /* moved to the store */
    rc = 0;
done:
    free(space);
    free(h.errors);
    return rc;
}

void row_store_drop(struct row_store *store)
{
    free(store->resident);
    store->resident = NULL;
}

struct vector_matrix row_store_matrix(const struct row_store *store)
{
    return (struct vector_matrix){.data = store->resident,
                                  .row_bytes = store->shape.stride,
                                  .count = store->count,
                                  .dim = store->shape.space_dim,
                                  .type = store->shape.space_type};
}
