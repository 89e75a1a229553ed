/* graph_file: a graph kept in a file of its own beside an index, so that builds of the same vectors
 * with other codes or stores need not make it again.
 *
 * The key names what the graph was made of (a digest of the vectors and of the graph's parameters,
 * the caller's): a graph of anything else is refused. Written aside, synced and renamed. All of it
 * is checksummed, and what is read is checked beyond that: every graph that comes out is safe to
 * search and to store, whoever wrote the file. Any thread. */
#ifndef ANND_INDEX_GRAPH_FILE_H
#define ANND_INDEX_GRAPH_FILE_H

#include <stdint.h>

#include "index/vamana.h"
#include "storage/base/digest.h"
#include "storage/base/error.h"
#include "storage/vfs.h"

#define GRAPH_FILE_DEGREE_MAX 256u

/* Replaces what is there. ERR_INVALID for a graph that graph_file_read would refuse; ERR_NOMEM,
 * ERR_IO, ERR_NO_SPACE, ERR_PERMISSION: then the old file, if any, is still there. */
int graph_file_write(struct vfs *vfs, const char *path, const struct graph *graph,
                     const uint8_t key[DIGEST_BYTES], struct error *err);

/* *out is the caller's and ends with graph_free(); NULL on failure. ERR_NOT_FOUND; ERR_INVALID for
 * another key (the message has both); ERR_CORRUPT with the offset; ERR_UNSUPPORTED for a newer
 * version; ERR_NOMEM, ERR_IO. */
int graph_file_read(struct vfs *vfs, const char *path, const uint8_t key[DIGEST_BYTES],
                    struct graph **out, struct error *err);

#endif
