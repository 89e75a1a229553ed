/* partition: puts the rows of an input in space order, a leaf for each of many centroids.
 *
 * A sample of PARTITION_SAMPLE rows a leaf is laid in space order (page_layout.h's bisection) and
 * cut into equal stretches; their means are the centroids, and every row of the input goes to the
 * leaf whose centroid is nearest to it. The nearest centroid is sought by leaf_finder.h in two
 * levels, so that it is the nearest but for a few rows in a thousand. Three passes over the input:
 * one that checks, digests and samples it, one that assigns, one that writes each row at its place,
 * by way of buckets on disk where the rows exceed the memory granted. The result is a function of
 * input, parameters and seed: not of memory, threads or buckets. Leaves are as uneven as the data.
 */
#ifndef ANND_INDEX_PARTITION_H
#define ANND_INDEX_PARTITION_H

#include "index/leaf_finder.h"
#include "index/row_store.h"
#include "index/vector_source.h"
#include "storage/base/digest.h"
#include "storage/base/job.h"
#include "storage/journal.h"

#define PARTITION_LEAF_ROWS 128u /* on average */
#define PARTITION_SAMPLE 16u

struct partition_facts {
    uint64_t zero_vectors;
    float norm_max;               /* inner product: the largest norm */
    uint8_t digest[DIGEST_BYTES]; /* of the input: SHA-256 over the SHA-256 of each piece of
                                   * PARTITION_DIGEST_ROWS rows, so that pieces go in parallel */
};
#define PARTITION_DIGEST_ROWS 16384u

/* Pass one: NaN and infinities refused with row and dimension (ERR_INVALID), zeros counted, norms,
 * digest. Nothing is written. */
int partition_inspect(const struct vector_source *source, const struct row_shape *shape,
                      struct pool *pool, struct job *job, struct partition_facts *facts,
                      struct error *err);

/* Passes two and three: leaves "rows" (raw rows by place, checksummed), "numbers" (u32 input row of
 * each place, checksummed) and "leaves" in the journal's scratch folder, synced. Goes on where the
 * journal's state says an earlier call stopped (entries "partition.*"; also with other memory), at
 * once where it was done. Commits about three times a minute, except while the sample is laid out
 * and while rows that fit the memory are put in their places. shape->norm_max is set. memory_bytes:
 * what this may hold in all. ERR_BUDGET below partition_memory_min(); ERR_CORRUPT when a scratch
 * file is gone or not as it was left, by the disk's fault or another's: what is read back is
 * checked; ERR_CANCELLED, ERR_IO, ERR_NO_SPACE, ERR_NOMEM. Phases: "sample",
 * "page order", "assign" and "place"; those found done are skipped. */
int partition_make(struct vfs *vfs, const struct vector_source *source,
                   const struct row_shape *shape, uint64_t seed, uint64_t memory_bytes,
                   struct journal *journal, struct pool *pool, struct job *job, struct error *err);

/* The least partition_make can do with, and what it takes to need no buckets. */
uint64_t partition_memory_min(const struct row_shape *shape, uint64_t count, uint32_t workers);
uint64_t partition_memory_full(const struct row_shape *shape, uint64_t count, uint32_t workers);
/* Bytes of scratch files while it runs, at most; and what it leaves. */
uint64_t partition_scratch_bytes(const struct row_shape *shape, uint64_t count, uint64_t memory);

#endif
