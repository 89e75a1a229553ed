/* Vector files: the formats vectors come in, their headers checked, and a writer for our own.
 *
 *     .fbin .u8bin .i8bin   uint32 rows, uint32 dim, then rows x dim elements
 *     .fvecs .bvecs         every row: uint32 dim, then dim float32 or uint8
 *     .npy                  NumPy versions 1 to 3, C order, 2-D: '<f4', '|u1' or '|i1';
 *                           1-D integers for keys, through npy_keys_open() only
 *
 * All little-endian, row-major; the suffix names the format, in any case. Headers are hostile:
 * a count of zero, a product that overflows or a file of another length than its header says is
 * ERR_INVALID, in one sentence with the path, wanted and found bytes, and what to do. Any thread
 * may read an open file; opening and writing belong to one. */
#ifndef ANND_INDEX_VECTOR_FILE_H
#define ANND_INDEX_VECTOR_FILE_H

#include <stdint.h>

#include "index/element.h"
#include "storage/base/error.h"
#include "storage/vfs.h"

#define VECTOR_FILE_DIM_MAX 65536u

enum vector_format {
    VECTOR_FBIN,
    VECTOR_U8BIN,
    VECTOR_I8BIN,
    VECTOR_FVECS,
    VECTOR_BVECS,
    VECTOR_NPY,
    VECTOR_FORMAT_COUNT
};

/* An open, checked file. Row i's elements are the row_bytes bytes at
 * data_offset + i * stride_bytes. */
struct vector_file {
    struct vfs_file *file;
    char *path;
    enum vector_format format;
    enum element_type type;
    uint32_t dim;
    uint64_t rows;
    uint64_t data_offset;
    uint32_t row_bytes;
    uint32_t stride_bytes; /* row_bytes, and 4 more where each row repeats its dimension */
};

/* *out is the caller's and ends with vector_file_close(). ERR_INVALID, ERR_NOT_FOUND, ERR_IO,
 * ERR_NOMEM. */
int vector_file_open(struct vfs *vfs, const char *path, struct vector_file **out,
                     struct error *err);
/* NULL is accepted. */
void vector_file_close(struct vector_file *file);

/* The format by the path's suffix; ERR_INVALID lists those there are. */
int vector_format_of_path(const char *path, enum vector_format *out, struct error *err);

/* Rows [first_row, first_row + count) packed into out: count x row_bytes. ERR_INVALID outside the
 * file and where a row of .fvecs or .bvecs has another dimension, which it names. */
int vector_file_read(const struct vector_file *file, uint64_t first_row, uint64_t count, void *out,
                     struct error *err);

/* Keys: a 1-D .npy of '<i8', '<u8', '<i4' or '<u4', read as int64. ERR_INVALID as above, and for a
 * '<u8' above INT64_MAX, named by its row. */
struct npy_keys;

int npy_keys_open(struct vfs *vfs, const char *path, struct npy_keys **out, struct error *err);
void npy_keys_close(struct npy_keys *keys);
uint64_t npy_keys_count(const struct npy_keys *keys);
int npy_keys_read(const struct npy_keys *keys, uint64_t first, uint64_t count, int64_t *out,
                  struct error *err);

/* Streaming writer of .fbin, .u8bin and .i8bin: path.tmp grows until vector_writer_close() puts the
 * row count in its header, syncs and renames it over `path`; until then `path` is as it was. */
struct vector_writer;

/* ERR_INVALID when the suffix is not the one of `type` or dim is 0 or too large. */
int vector_writer_open(struct vfs *vfs, const char *path, enum element_type type, uint32_t dim,
                       struct vector_writer **out, struct error *err);
/* count rows of dim elements, packed. ERR_INVALID past 2^32 - 1 rows. */
int vector_writer_append(struct vector_writer *writer, const void *rows, uint64_t count,
                         struct error *err);
/* Publishes and frees the writer, also on failure (then the .tmp is removed). ERR_INVALID when
 * no row was written. */
int vector_writer_close(struct vector_writer *writer, struct error *err);
/* Removes the .tmp and frees the writer. NULL is accepted. */
void vector_writer_abort(struct vector_writer *writer);

#endif
