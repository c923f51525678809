/* A student by itself on a Cortex-M: images in, features out, by semihosting, which emulators and debuggers serve.
 *
 * Reads images from the file images.bin and writes features to features.bin, both without any header. Of the first
 * image it reports ticks of SysTick for each step, and at the end the bytes of stack that were used.
 *
 * With NONN_UART, the address of a serial port, images come and features go there, a byte a feature, without end. */
#include <stdint.h>

#include "student.h"

enum { SYS_OPEN = 1, SYS_CLOSE = 2, SYS_WRITE0 = 4, SYS_WRITE = 5, SYS_READ = 6, SYS_EXIT = 0x18 };
enum { READ_BINARY = 1, WRITE_BINARY = 5, SUCCESS = 0x20026, FAILURE = 0x20023 };
#define PAINT 0xA5A5A5A5u
#ifndef CALIBRATION /* as build.py has it */
#define CALIBRATION 2000000u
#endif
#define SYSTICK ((volatile uint32_t *)0xE000E010)
#define CPACR (*(volatile uint32_t *)0xE000ED88)

extern uint32_t stack_limit[], stack_top[], data_start[], data_end[], data_load[], bss_start[], bss_end[];
int main(void);

static volatile uint32_t wraps;

static int semihost(int operation, const void *argument) {
  register int r0 __asm__("r0") = operation;
  register const void *r1 __asm__("r1") = argument;
  __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

static void stop(int reason) {
  semihost(SYS_EXIT, (const void *)reason);
  for (;;) {
  }
}

#ifndef NONN_UART
static uint64_t step_ticks[NONN_STEPS], last;
static int is_timed;

static int open_file(const char *name, int mode) {
  int length = 0;
  while (name[length]) length++;
  const uint32_t block[3] = {(uint32_t)name, mode, length};
  return semihost(SYS_OPEN, block);
}

/* Bytes that were not read or written. */
static int transfer(int operation, int file, const void *data, int size) {
  const uint32_t block[3] = {file, (uint32_t)data, size};
  return semihost(operation, block);
}

static void report(const char *name, uint64_t value) {
  char digits[24], *p = digits + sizeof digits;
  *--p = 0;
  *--p = '\n';
  do *--p = '0' + value % 10;
  while (value /= 10);
  *--p = ' ';
  semihost(SYS_WRITE0, name);
  semihost(SYS_WRITE0, p);
}

static uint64_t ticks(void) {
  uint32_t before, value;
  do before = wraps, value = SYSTICK[2];
  while (before != wraps);
  return (uint64_t)before * 0x1000000u + (0xFFFFFFu - value);
}

void nonn_step_done(int step) {
  if (!is_timed) return;
  const uint64_t now = ticks();
  step_ticks[step] = now - last;
  last = now;
}

/* How many ticks a loop of two instructions takes, CALIBRATION of them in all: an emulator counts instructions, a processor cycles. */
static uint64_t calibrated(void) {
  uint32_t rounds = CALIBRATION / 2;
  const uint64_t start = ticks();
  __asm__ volatile("1: subs %0, %0, #1\n bne 1b" : "+r"(rounds) : : "cc");
  return ticks() - start;
}

int main(void) {
  SYSTICK[1] = 0xFFFFFF;
  SYSTICK[2] = 0;
  SYSTICK[0] = 7;
  while (SYSTICK[2] == 0) {
  }
  report("calibration", calibrated());
  const int images = open_file("images.bin", READ_BINARY), features = open_file("features.bin", WRITE_BINARY);
  if (images < 0 || features < 0) stop(FAILURE);
  uint32_t count = 0;
  while (transfer(SYS_READ, images, NONN_IMAGE, NONN_IMAGE_BYTES) == 0) {
    is_timed = count++ == 0;
    const uint64_t start = last = ticks();
    nonn_infer();
    if (is_timed) report("ticks", ticks() - start);
    if (transfer(SYS_WRITE, features, NONN_FEATURES, 4 * NONN_FEATURES_COUNT)) stop(FAILURE);
  }
  semihost(SYS_CLOSE, &features);
  for (int step = 0; step < NONN_STEPS; step++) report("step", step_ticks[step]);
  const uint32_t *p = stack_limit;
  while (p < stack_top && *p == PAINT) p++;
  report("stack", 4 * (stack_top - p));
  report("images", count);
  stop(SUCCESS);
}
#else
/* The CMSDK UART of Arm's MPS2 boards: data, state, control, interrupts, divider of the clock. A board of your own has
 * another, and needs other versions of these three functions. */
enum { DATA, STATE, CONTROL, INTERRUPTS, DIVIDER, IS_FULL = 1, HAS_BYTE = 2, TALK_AND_WAKE = 1 | 2 | 8 };
#define UART ((volatile uint32_t *)NONN_UART)
#define ENABLED (*(volatile uint32_t *)0xE000E100)
#define PENDING (*(volatile uint32_t *)0xE000E280)
#define READY 'R'

/* Interrupts are masked: a pending one ends a wait, and calls nothing. */
static void open_port(void) {
  __asm__ volatile("cpsid i");
  UART[DIVIDER] = 16;
  UART[CONTROL] = TALK_AND_WAKE;
  ENABLED = 1;
}

static uint8_t receive(void) {
  while (!(UART[STATE] & HAS_BYTE)) {
    __asm__ volatile("wfi");
    UART[INTERRUPTS] = HAS_BYTE;
    PENDING = 1;
  }
  return UART[DATA];
}

static void send(uint8_t byte) {
  while (UART[STATE] & IS_FULL) {
  }
  UART[DATA] = byte;
}

void nonn_step_done(int step) { (void)step; }

/* Adding 2^23 rounds what is not negative to an integer, half to even. */
static uint8_t quantised(float feature) {
  const float value = (feature - NONN_FEATURES_LOW) * NONN_FEATURES_PER_UNIT + 0x1p23f - 0x1p23f;
  return value > 255 ? 255 : value > 0 ? (uint8_t)value : 0;
}

int main(void) {
  open_port();
  send(READY);
  for (;;) {
    for (int i = 0; i < NONN_IMAGE_BYTES; i++) NONN_IMAGE[i] = receive();
    nonn_infer();
    for (int i = 0; i < NONN_FEATURES_COUNT; i++) send(quantised(NONN_FEATURES[i]));
  }
}
#endif

void reset(void) {
  CPACR |= 0xF << 20; /* the floating-point unit on */
  __asm__ volatile("dsb\n isb");
  const uint32_t *source = data_load;
  for (uint32_t *p = data_start; p < data_end;) *p++ = *source++;
  for (uint32_t *p = bss_start; p < bss_end;) *p++ = 0;
  for (uint32_t *p = stack_limit; p < (uint32_t *)__builtin_frame_address(0) - 16;) *p++ = PAINT;
  main();
}

static void fault(void) {
  semihost(SYS_WRITE0, "fault\n");
  stop(FAILURE);
}

static void count_wrap(void) { wraps++; }

__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))stack_top, reset, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, count_wrap};
