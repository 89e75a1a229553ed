/* row_store: all rows of a build in a scratch file, in space order, cut into leaves.
 *
 * The order is a permutation of the input: `place` counts rows in it, `row` in the input. Rows of a
 * leaf have one centroid nearest (partition.h makes that so); neighbouring leaves are near each
 * other. The file holds raw rows of the input's type, each with a checksum that knows its place, so
 * that a row that was lost, damaged or put elsewhere is found when it is read. What graph and page
 * order compare are *space rows*: vectors whose squared L2 ranks as the metric does. u8 and i8
 * under L2 are their own space rows; floats under L2 too; cosine takes x / |x| as f32; inner
 * product takes (x, sqrt(M^2 - |x|^2)) with M the largest norm (Bachrach et al., "Speeding Up the
 * Xbox Recommender System Using a Euclidean Transformation for Inner-Product Spaces", 2014). That
 * is for edges and order alone: codes, pages and scores use the true metric.
 *
 * Reads are any thread's; the rest belongs to one. */
#ifndef ANND_INDEX_ROW_STORE_H
#define ANND_INDEX_ROW_STORE_H

#include <stdint.h>

#include "index/distance.h"
#include "index/element.h"
#include "index/vamana.h"
#include "storage/base/error.h"
#include "storage/base/pool.h"
#include "storage/vfs.h"

/* What a space row is made of. */
struct row_shape {
    enum metric metric;
    enum element_type element; /* of the input: f32, u8, i8 */
    uint32_t dim;              /* of the input */
    uint64_t raw_bytes;        /* a raw row, packed */
    enum element_type space_type;
    uint32_t space_dim;
    uint64_t stride; /* bytes between space rows: block_row_stride() */
    float norm_max;  /* M of inner product, else unused */
};

/* norm_max is left 0. */
void row_shape_init(struct row_shape *shape, enum metric metric, enum element_type element,
                    uint32_t dim);
/* count raw rows (packed) to space rows (stride apart, padded with zeros, 64-byte aligned). `raw`
 * may be the last count * raw_bytes of the room `space` has: then rows are converted in place. */
void row_shape_convert(const struct row_shape *shape, const uint8_t *raw, uint64_t count,
                       uint8_t *space);
/* A space row's first `dim` elements as floats: the row as codes see it. */
void row_shape_floats(const struct row_shape *shape, const uint8_t *space_row, float *out);

/* A row in "rows": raw_bytes and the CRC-32C of them that starts from the row's place. */
#define ROW_STORE_CRC_BYTES 4u

static inline uint64_t row_store_record_bytes(const struct row_shape *shape)
{
    return shape->raw_bytes + ROW_STORE_CRC_BYTES;
}

uint32_t row_store_crc(const struct row_shape *shape, uint32_t place, const uint8_t *raw);

struct row_store {
    struct row_shape shape;
    uint32_t count;
    uint32_t leaf_count;
    uint32_t *leaf_begins; /* leaf_count + 1 places, ascending; leaves may be empty */
    float *centroids;      /* leaf_count x space_dim */
    uint32_t group_count;  /* groups of ROW_STORE_GROUP leaves that stand together */
    struct vfs_file *file; /* records by place */
    char *path;
    uint8_t *resident; /* count x stride space rows when they are held in memory, else NULL */
};

#define ROW_STORE_GROUP 64u /* leaves a group */

/* Opens what partition.h left in `folder`: files "rows" and "leaves". ERR_CORRUPT when they are
 * gone or damaged or do not fit each other or `count`. *out ends with row_store_close(). */
int row_store_open(struct vfs *vfs, const char *folder, const struct row_shape *shape,
                   uint32_t count, struct row_store **out, struct error *err);
void row_store_close(struct row_store *store);
/* Publishes "leaves"; for partition.h. */
int row_store_write_leaves(struct vfs *vfs, const char *folder, const struct row_shape *shape,
                           uint32_t count, uint32_t leaf_count, const uint32_t *leaf_begins,
                           const float *centroids, struct error *err);

/* "numbers", for partition.h and its readers: the u32 input row of each place, then the CRC-32C of
 * all of them. *out (count of them, malloc'ed) is a permutation of 0 .. count - 1, or the answer is
 * ERR_CORRUPT, also when the file is gone. ERR_IO, ERR_NOMEM. */
int row_store_read_numbers(struct vfs *vfs, const char *folder, uint32_t count, uint32_t **out,
                           struct error *err);
/* Opens a scratch file that must be there: ERR_CORRUPT where file_open() has ERR_NOT_FOUND. */
struct vfs_file *row_store_open_scratch(struct vfs *vfs, const char *path, unsigned flags,
                                        struct error *err);

/* Reads all space rows into memory (huge pages advised), or drops them again. ERR_NOMEM, ERR_IO,
 * ERR_CORRUPT. */
int row_store_hold(struct row_store *store, struct pool *pool, struct error *err);
void row_store_drop(struct row_store *store);

/* Both check every row that they take from the file: ERR_CORRUPT names the first that is not as it
 * was written. Of many rows they read ROW_STORE_READ_BYTES at once and take heap for as much.
 *
 * Raw rows of places [first, first + count), packed. */
#define ROW_STORE_READ_BYTES (256u << 10)
int row_store_read_raw(const struct row_store *store, uint32_t first, uint32_t count, uint8_t *raw,
                       struct error *err);
/* Space rows of places [first, first + count), stride apart. */
int row_store_read(const struct row_store *store, uint32_t first, uint32_t count, uint8_t *space,
                   struct error *err);

/* The held rows as vamana.h and page_layout.h take them. */
struct vector_matrix row_store_matrix(const struct row_store *store);

#endif
