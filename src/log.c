/* A line is built in a buffer on the stack and leaves in one write(2), so lines of several threads
 * do not mix and no lock is held while the terminal or the journal is slow. */
#include "src/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "storage/base/json_reader.h"

static int log_fd = STDERR_FILENO;
static pthread_mutex_t gate_lock = PTHREAD_MUTEX_INITIALIZER;

void log_to(int fd)
{
    log_fd = fd;
}

static const char *level_text(enum log_level level)
{
    switch (level) {
    case LOG_LEVEL_INFO:
        return "INFO ";
    case LOG_LEVEL_WARNING:
        return "WARN ";
    default:
        return "ERROR";
    }
}

size_t log_format_line(char *out, int64_t realtime_ms, enum log_level level, const char *text)
{
    static const char hex[] = "0123456789abcdef";
    time_t seconds = (time_t)(realtime_ms / 1000);
    struct tm utc;
    size_t length;
    size_t left = strlen(text);

    gmtime_r(&seconds, &utc);
    length = strftime(out, LOG_LINE_BYTES_MAX, "%Y-%m-%dT%H:%M:%S", &utc);
    length += (size_t)snprintf(out + length, LOG_LINE_BYTES_MAX - length, ".%03dZ %s ",
                               (int)(realtime_ms % 1000), level_text(level));
    while (left > 0) {
        unsigned char byte = (unsigned char)*text;
        size_t take = 1;

        if (byte >= 0x20 && byte < 0x7f && byte != '\\') {
            if (length + 1 >= LOG_LINE_BYTES_MAX)
                break;
            out[length++] = (char)byte;
        } else {
            size_t sequence = byte < 0xc2 ? 0 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;

            /* U+0080 to U+009F are controls too: CSI is one. */
            if (sequence > 0 && sequence <= left && utf8_valid_bytes(text, sequence) == sequence &&
                !(byte == 0xc2 && (unsigned char)text[1] < 0xa0)) {
                if (length + sequence >= LOG_LINE_BYTES_MAX)
                    break;
                memcpy(out + length, text, sequence);
                length += sequence;
                take = sequence;
            } else {
                if (length + 4 >= LOG_LINE_BYTES_MAX)
                    break;
                out[length++] = '\\';
                out[length++] = 'x';
                out[length++] = hex[byte >> 4];
                out[length++] = hex[byte & 15];
            }
        }
        text += take;
        left -= take;
    }
    out[length++] = '\n';
    return length;
}

static void write_line(enum log_level level, const char *text)
{
    char line[LOG_LINE_BYTES_MAX];
    struct timespec now;
    size_t bytes;

    clock_gettime(CLOCK_REALTIME, &now);
    bytes = log_format_line(line, (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000, level, text);
    /* Nobody is left to tell when this fails. */
    if (write(log_fd, line, bytes) < 0)
        return;
}

static void write_format(enum log_level level, const char *format, va_list args)
{
    char text[LOG_LINE_BYTES_MAX];

    vsnprintf(text, sizeof text, format, args);
    write_line(level, text);
}

void log_info(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    write_format(LOG_LEVEL_INFO, format, args);
    va_end(args);
}

void log_warning(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    write_format(LOG_LEVEL_WARNING, format, args);
    va_end(args);
}

void log_error(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    write_format(LOG_LEVEL_ERROR, format, args);
    va_end(args);
}

void log_gated(struct log_gate *gate, uint32_t per_minute, enum log_level level, const char *format,
               ...)
{
    char text[LOG_LINE_BYTES_MAX];
    struct timespec now;
    uint64_t now_us;
    uint32_t suppressed;
    va_list args;
    int length;

    clock_gettime(CLOCK_MONOTONIC, &now);
    now_us = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
    pthread_mutex_lock(&gate_lock);
    if (gate->window_start_us == 0 || now_us - gate->window_start_us >= 60000000) {
        gate->window_start_us = now_us;
        gate->written = 0;
    }
    if (gate->written >= per_minute) {
        gate->suppressed++;
        pthread_mutex_unlock(&gate_lock);
        return;
    }
    gate->written++;
    suppressed = gate->suppressed;
    gate->suppressed = 0;
    pthread_mutex_unlock(&gate_lock);

    va_start(args, format);
    length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (suppressed > 0 && length >= 0 && (size_t)length < sizeof text)
        snprintf(text + length, sizeof text - (size_t)length, " (%u like it left out)", suppressed);
    write_line(level, text);
}
