/* Vector source: rows by number, in blocks, wherever they come from.
 *
 * What builds and searches read vectors from: a file of any format in vector_file.h, or memory.
 * Immutable once open; any thread may read. */
#ifndef ANND_INDEX_VECTOR_SOURCE_H
#define ANND_INDEX_VECTOR_SOURCE_H

#include <stdint.h>

#include "index/element.h"
#include "storage/base/error.h"
#include "storage/vfs.h"

struct vector_source;

/* Errors as vector_file_open(). *out ends with vector_source_close(). */
int vector_source_open(struct vfs *vfs, const char *path, struct vector_source **out,
                       struct error *err);
/* Rows x dim elements in memory, packed, borrowed until close. `name` is used in messages and
 * copied. ERR_INVALID if rows or dim is 0. */
int vector_source_open_memory(const void *data, enum element_type type, uint64_t rows, uint32_t dim,
                              const char *name, struct vector_source **out, struct error *err);
/* NULL is accepted. */
void vector_source_close(struct vector_source *source);

const char *vector_source_name(const struct vector_source *source); /* the path */
enum element_type vector_source_type(const struct vector_source *source);
uint64_t vector_source_rows(const struct vector_source *source);
uint32_t vector_source_dim(const struct vector_source *source);
uint32_t vector_source_row_bytes(const struct vector_source *source);

/* Rows [first_row, first_row + count) into out: count x row_bytes, packed. ERR_INVALID outside the
 * source. Values are as stored: NaN is for vector_source_check() to find. */
int vector_source_read(const struct vector_source *source, uint64_t first_row, uint64_t count,
                       void *out, struct error *err);
/* The same as count x dim float32 whatever the type. */
int vector_source_read_f32(const struct vector_source *source, uint64_t first_row, uint64_t count,
                           float *out, struct error *err);

/* ERR_INVALID naming source, row and dimension of the first NaN or infinity among `count` rows
 * that were read from first_row on; rows are of the source's type (integers always pass). */
int vector_source_check(const struct vector_source *source, const void *rows, uint64_t first_row,
                        uint64_t count, struct error *err);
/* The same for float32 rows of any origin; the message names row and dimension alone. */
int vector_check_finite(const float *rows, uint64_t first_row, uint64_t count, uint32_t dim,
                        struct error *err);

#endif
