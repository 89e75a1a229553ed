/* cells: groups of consecutive pages, and which of them are near a query.
 *
 * Pages stand in space order, so a run of pages is an inverted list that costs no more than its
 * centroid. A query ranks the centroids, scans the codes of the nearest cells in one pass
 * (code_scan.h) and starts its walk from the best. Centroids are kept as a byte a dimension between
 * one least and one greatest value; many of them are ranked in two levels: groups of consecutive
 * cells first, then the cells of the nearest groups.
 * (Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", 2011, section IV, with
 * the page order in place of a coarse quantiser.)
 *
 * Immutable once made: any number of threads rank at once, each with its own scratch. */
#ifndef ANND_INDEX_CELLS_H
#define ANND_INDEX_CELLS_H

#include <stddef.h>
#include <stdint.h>

#include "index/distance.h"
#include "index/element.h"
#include "storage/base/error.h"

struct cells;

/* Rows [cell * cell_rows, ...) of row_count form a cell, the last one the rest. */
uint32_t cells_count(const struct cells *cells);
uint32_t cells_rows(const struct cells *cells); /* positions a cell spans */
uint32_t cells_dim(const struct cells *cells);
uint64_t cells_memory_bytes(const struct cells *cells);
/* What cells_memory_bytes will be, before there are any. */
uint64_t cells_memory_plan(uint64_t row_count, uint32_t cell_rows, uint32_t dim);

/* Building: vectors are added in position order (dim floats each, finite, as distances see them:
 * cosine callers add normalised ones), then the cells are made. The builder holds a float a
 * dimension of every cell. ERR_INVALID: rows above 2^32 - 1, a cell of no rows, no or too many
 * dimensions. */
struct cells_builder;
int cells_builder_new(uint64_t row_count, uint32_t cell_rows, uint32_t dim,
                      struct cells_builder **out, struct error *err);
void cells_builder_add(struct cells_builder *builder, const float *vectors, uint32_t count);
/* ERR_INTERNAL unless row_count vectors were added; ERR_INVALID when one was not finite. */
int cells_builder_finish(struct cells_builder *builder, struct cells **out, struct error *err);
void cells_builder_free(struct cells_builder *builder);
void cells_free(struct cells *cells);

/* Bytes of the section and back; `where` names the source in errors. ERR_CORRUPT; ERR_UNSUPPORTED
 * when a newer program wrote them. Cells read back rank exactly as those written. */
int cells_encode_bytes(const struct cells *cells, uint8_t **out, size_t *bytes, struct error *err);
int cells_decode_bytes(const uint8_t *data, size_t bytes, const char *where, struct cells **out,
                       struct error *err);

/* Scratch a ranking of up to `want` cells needs. */
size_t cells_scratch_bytes(const struct cells *cells, uint32_t want);
/* The `want` cells nearest to a query (dim floats) by squared L2, or by greatest inner product
 * under METRIC_IP (cosine: normalised vectors and L2), ascending by cell number into out. Returns
 * how many: fewer only when there are fewer. Two levels may miss a few of the true nearest; the
 * same query always gets the same cells, with every table of kernels. For L2 the query is clamped
 * to the centroids' range of values. No allocation. scratch: 64-byte aligned. */
uint32_t cells_nearest(const struct cells *cells, const struct distance_kernels *kernels,
                       enum metric metric, const float *query, uint32_t want, void *scratch,
                       uint32_t *out);

/* The same for the last of `ends`, in stages: the ends[s] nearest (ascending numbers, 1 and more)
 * stand before out[ends[s]], each stage ascending by cell number. When all cells are wanted they
 * come unranked. */
#define CELL_STAGES_MAX 16u
uint32_t cells_nearest_in_stages(const struct cells *cells, const struct distance_kernels *kernels,
                                 enum metric metric, const float *query, const uint32_t *ends,
                                 uint32_t stage_count, void *scratch, uint32_t *out);

#endif
