/* leaf_finder: the nearest of many centroids, for many rows at once.
 *
 * Two levels: leaves that stand together in space order make groups of up to 64, cut as the tree
 * was that put them in order; a group's centroid is the mean of its leaves'. For a row the nearest
 * groups are chosen and the leaves in them compared; others are never looked at, so a leaf found is
 * nearest among those alone. Rows are taken in chunks of LEAF_FINDER_ROWS: all of a chunk that
 * chose a group meet its leaves in one block product.
 *
 * u8 and i8 rows are compared with centroids rounded to whole numbers, exactly: what is found for a
 * row is then its own. Products of floats depend in their last bits on the shape of the block:
 * there the same chunks of rows give the same leaves, whatever the threads. */
#ifndef ANND_INDEX_LEAF_FINDER_H
#define ANND_INDEX_LEAF_FINDER_H

#include "index/row_store.h"

#define LEAF_FINDER_ROWS 1024u
#define LEAF_FINDER_PROBES_MAX 64u
#define LEAF_NONE UINT32_MAX

struct leaf_finder; /* immutable: any number of threads */

/* centroids: leaf_count x space_dim, copied. ERR_NOMEM. */
int leaf_finder_new(const struct row_shape *shape, const float *centroids, uint32_t leaf_count,
                    struct leaf_finder **out, struct error *err);
void leaf_finder_free(struct leaf_finder *finder);
/* A finder and one scratch for each worker, at most. */
uint64_t leaf_finder_memory_bytes(const struct row_shape *shape, uint32_t leaf_count,
                                  uint32_t workers);

/* One worker's scratch, for calls with up to rows_max rows and up to `probes` leaves each, at most
 * LEAF_FINDER_PROBES_MAX. ERR_NOMEM. */
struct leaf_finder_scratch;
int leaf_finder_scratch_new(const struct leaf_finder *finder, uint32_t rows_max, uint32_t probes,
                            struct leaf_finder_scratch **out, struct error *err);
void leaf_finder_scratch_free(struct leaf_finder_scratch *scratch);

/* Fills leaves[i * probes + j] for `rows` space rows (stride apart, aligned to 64 bytes), nearest
 * first, ties to the smaller number; LEAF_NONE where there are fewer leaves than probes. */
void leaf_finder_find(const struct leaf_finder *finder, struct leaf_finder_scratch *scratch,
                      const uint8_t *space_rows, uint32_t rows, uint32_t probes, uint32_t *leaves);

#endif
