/* segment_writer: appends sections, checksums them, publishes the directory with one rename.
 *
 * Everything is written to "<path>.tmp" and renamed to `path` by segment_writer_publish, after each
 * file and the folder have been synced: a reader sees a whole segment or none. One thread per
 * writer; sections are written one after the other. */
#ifndef ANND_STORAGE_SEGMENT_WRITER_H
#define ANND_STORAGE_SEGMENT_WRITER_H

#include <stdint.h>

#include "storage/segment.h"

struct segment_writer;

/* Makes "<path>.tmp" (a leftover one is removed). `id` is the digest of input and parameters: no
 * clock, path, host or thread count in it. ERR_EXISTS when `path` is there. */
int segment_writer_open(struct vfs *vfs, const char *path, const uint8_t id[DIGEST_BYTES],
                        uint64_t row_count, struct segment_writer **out, struct error *err);
/* Removes "<path>.tmp" unless published. NULL is accepted. */
void segment_writer_close(struct segment_writer *writer);

/* The manifest to be: parameters are set here by the caller, sections are added by the writer. */
struct manifest *segment_writer_manifest(struct segment_writer *writer);

/* Starts a section; only one is open at a time. block_bytes: multiple of FILE_BLOCK_BYTES. */
int segment_writer_begin(struct segment_writer *writer, const char *name, enum section_kind kind,
                         uint32_t block_bytes, struct error *err);
/* Appends payload bytes; blocks fill up and are written in large runs. */
int segment_writer_append(struct segment_writer *writer, const void *data, uint64_t bytes,
                          struct error *err);
/* Payload bytes appended to the open section so far. */
uint64_t segment_writer_offset(const struct segment_writer *writer);
int segment_writer_end(struct segment_writer *writer, struct error *err);

/* Writes segment.manifest of the sections ended so far, so that
 * segment_open(segment_writer_folder()) works while the writer goes on: what was just written can
 * be measured. Not durable, and replaced by the next preview and by publish. ERR_INVALID while a
 * section is open. Segments opened from it are closed before the writer. */
int segment_writer_preview(struct segment_writer *writer, struct error *err);
/* "<path>.tmp", the writer's. */
const char *segment_writer_folder(const struct segment_writer *writer);

/* Syncs, writes segment.manifest, renames. */
int segment_writer_publish(struct segment_writer *writer, struct error *err);

#endif
