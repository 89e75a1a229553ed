/* How it works: the file is read whole (100 neighbours of a million queries are 800 MB; usual sets
 * have thousands), split into its two arrays and every value looked at once. */
#include "index/truth_file.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/file.h"

#define HEADER_BYTES 8u

/* Of a file with these counts; false on overflow. */
static bool file_bytes_for(uint64_t query_count, uint64_t k, uint64_t *bytes)
{
    return size_mul(query_count, k, bytes) && size_mul(*bytes, 8, bytes) &&
           size_add(*bytes, HEADER_BYTES, bytes) && *bytes <= SIZE_MAX / 2;
}

static int check_values(const char *path, const struct truth *truth, uint64_t base_rows,
                        struct error *err)
{
    uint64_t count = (uint64_t)truth->query_count * truth->k;

    for (uint64_t i = 0; i < count; i++) {
        uint64_t query = i / truth->k, rank = i % truth->k + 1;

        if (base_rows && truth->ids[i] >= base_rows) {
            error_set(err, ERR_INVALID,
                      "%s: neighbour %" PRIu64 " of query %" PRIu64
                      " is row %u, the base has %" PRIu64 " rows",
                      path, rank, query, truth->ids[i], base_rows);
            error_remedy(err, "use the truth file of this base, or make one with: annd truth");
            return -1;
        }
        if (isnan(truth->distances[i]))
            return error_set(err, ERR_INVALID,
                             "%s: the distance of neighbour %" PRIu64 " of query %" PRIu64
                             " is NaN",
                             path, rank, query);
    }
    return 0;
}

int truth_file_read(struct vfs *vfs, const char *path, uint64_t base_rows, struct truth *out,
                    struct error *err)
{
    struct truth truth = {0};
    struct vfs_file *file = NULL;
    uint8_t header[HEADER_BYTES];
    uint64_t found, wanted;
    size_t half;
    int rc = -1;

    file = file_open(vfs, path, VFS_READ, err);
    if (!file || file_size(file, path, &found, err) < 0)
        goto done;
    if (found < sizeof header) {
        error_set(err, ERR_INVALID, "%s: the header takes %zu bytes, the file has %" PRIu64, path,
                  sizeof header, found);
        goto done;
    }
    if (file_read_exact(file, path, header, sizeof header, 0, err) < 0)
        goto done;
    truth.query_count = load_u32(header);
    truth.k = load_u32(header + 4);
    if (!truth.query_count || !truth.k) {
        error_set(err, ERR_INVALID,
                  "%s: the header says %u queries with %u neighbours each; a truth file has at "
                  "least one of each",
                  path, truth.query_count, truth.k);
        goto done;
    }
    if (!file_bytes_for(truth.query_count, truth.k, &wanted)) {
        error_set(err, ERR_INVALID,
                  "%s: the header says %u queries with %u neighbours each, more than any file "
                  "holds",
                  path, truth.query_count, truth.k);
        goto done;
    }
    if (wanted != found) {
        error_set(err, ERR_INVALID,
                  "%s: %u queries with %u neighbours each need a file of %" PRIu64
                  " bytes, found %" PRIu64,
                  path, truth.query_count, truth.k, wanted, found);
        error_remedy(err, "a truth file is uint32 queries, uint32 k, all ids as uint32, then all "
                          "distances as float32");
        goto done;
    }
    half = (size_t)(wanted - HEADER_BYTES) / 2;
    truth.ids = malloc(half);
    truth.distances = malloc(half);
    if (!truth.ids || !truth.distances) {
        error_set(err, ERR_NOMEM, "%s: no memory for its %" PRIu64 " bytes", path, found);
        goto done;
    }
    if (file_read_exact(file, path, truth.ids, half, HEADER_BYTES, err) < 0 ||
        file_read_exact(file, path, truth.distances, half, HEADER_BYTES + half, err) < 0 ||
        check_values(path, &truth, base_rows, err) < 0)
        goto done;
    *out = truth;
    truth = (struct truth){0}; /* moved to the caller */
    rc = 0;
done:
    truth_release(&truth);
    file_close(file, path, NULL);
    return rc;
}

int truth_file_write(struct vfs *vfs, const char *path, const struct truth *truth,
                     struct error *err)
{
    uint8_t *bytes = NULL;
    uint64_t size;
    size_t half;
    int rc = -1;

    if (!truth->query_count || !truth->k || !file_bytes_for(truth->query_count, truth->k, &size))
        return error_set(err, ERR_INVALID,
                         "%s: a truth file of %u queries with %u neighbours each cannot be", path,
                         truth->query_count, truth->k);
    bytes = malloc(size);
    if (!bytes) {
        error_set(err, ERR_NOMEM, "%s: no memory for its %" PRIu64 " bytes", path, size);
        goto done;
    }
    half = (size_t)(size - HEADER_BYTES) / 2;
    store_u32(bytes, truth->query_count);
    store_u32(bytes + 4, truth->k);
    memcpy(bytes + HEADER_BYTES, truth->ids, half);
    memcpy(bytes + HEADER_BYTES + half, truth->distances, half);
    rc = file_publish(vfs, path, bytes, size, err);
done:
    free(bytes);
    return rc;
}

void truth_release(struct truth *truth)
{
    free(truth->ids);
    free(truth->distances);
    *truth = (struct truth){0};
}
