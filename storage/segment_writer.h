/* segment_writer: appends sections, checksums them, publishes the directory with one rename.
 *
 * Everything is written to "<path>.tmp" and renamed to `path` by segment_writer_publish, after each
 * file and the folder have been synced: a reader sees a whole segment or none. One thread per
 * writer; sections are written one after the other. A writer hashes what it wrote on a thread of
 * its own.
 *
 * A long build makes checkpoints. When it was killed, segment_writer_resume goes on with what the
 * last one holds, and publishes the same bytes as if nothing had happened:
 *
 *     segment_writer_resume(...);
 *     if (!segment_writer_has(writer, "f0.codes")) {
 *         segment_writer_begin_at(..., "f0.codes", ..., &payload_bytes, err);
 *         append from payload byte payload_bytes on, with a segment_writer_checkpoint() at times
 *         segment_writer_end(...);
 *     }
 *     the next section; segment_writer_publish(...); */
#ifndef ANND_STORAGE_SEGMENT_WRITER_H
#define ANND_STORAGE_SEGMENT_WRITER_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/job.h"
#include "storage/segment.h"

struct segment_writer;

/* Makes "<path>.tmp" (a leftover one is removed). `id` is the digest of input and parameters: no
 * clock, path, host or thread count in it. ERR_EXISTS when `path` is there. */
int segment_writer_open(struct vfs *vfs, const char *path, const uint8_t id[DIGEST_BYTES],
                        uint64_t row_count, struct segment_writer **out, struct error *err);
/* As segment_writer_open, but adopts the "<path>.tmp" an earlier writer left, when that has a
 * checkpoint of the same id and row count: its whole sections, in their order up to the first whose
 * file is missing or of another length, the part it holds of the section after them, and the
 * parameters set in the manifest by then (setting them again does no harm). All else in there is
 * removed; without a usable checkpoint the writer starts anew. Sections must be written in the same
 * order again. Nobody else may be writing the same segment: the caller holds a lock on that. */
int segment_writer_resume(struct vfs *vfs, const char *path, const uint8_t id[DIGEST_BYTES],
                          uint64_t row_count, struct segment_writer **out, struct error *err);
/* Removes "<path>.tmp" unless it is published or holds a checkpoint. NULL is accepted. */
void segment_writer_close(struct segment_writer *writer);

/* The manifest to be: parameters are set here by the caller, sections are added by the writer. */
struct manifest *segment_writer_manifest(struct segment_writer *writer);

/* The section is whole: written by this writer, or by the one it resumes. */
bool segment_writer_has(const struct segment_writer *writer, const char *name);

/* Starts a section; only one is open at a time. block_bytes: multiple of FILE_BLOCK_BYTES. Always
 * from its first byte: what a checkpoint holds of it is dropped. */
int segment_writer_begin(struct segment_writer *writer, const char *name, enum section_kind kind,
                         uint32_t block_bytes, struct error *err);
/* As segment_writer_begin, but goes on behind what the checkpoint holds of this very section (same
 * name, kind and block_bytes): the caller appends from payload byte *payload_bytes on, which is a
 * multiple of block_bytes - BLOCK_CRC_BYTES. 0 when nothing is held, or what is held fails a check:
 * all of it is read back and verified, at the speed of the disk. job may be NULL; it is only asked
 * whether it is cancelled (ERR_CANCELLED; the checkpoint stays). */
int segment_writer_begin_at(struct segment_writer *writer, const char *name, enum section_kind kind,
                            uint32_t block_bytes, struct job *job, uint64_t *payload_bytes,
                            struct error *err);
/* Appends payload bytes; blocks fill up and are written in large runs. */
int segment_writer_append(struct segment_writer *writer, const void *data, uint64_t bytes,
                          struct error *err);
/* Payload bytes appended to the open section so far. */
uint64_t segment_writer_offset(const struct segment_writer *writer);
int segment_writer_end(struct segment_writer *writer, struct error *err);

/* Makes durable what segment_writer_resume needs: the sections ended so far, the manifest's entries
 * and, of the open section, its whole blocks. *payload_bytes (may be NULL): how many payload bytes
 * of the open section those hold, 0 when none is open. Costs two or three syncs. From then on
 * segment_writer_close leaves the folder. */
int segment_writer_checkpoint(struct segment_writer *writer, uint64_t *payload_bytes,
                              struct error *err);

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
