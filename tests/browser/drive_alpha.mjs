// Uses the page that chooses alpha, offline or of a server, and prints what happened as JSON.
//
//   node drive_alpha.mjs file:///.../alpha.html OUTPUT_FOLDER
//   node drive_alpha.mjs http://127.0.0.1:PORT/ OUTPUT_FOLDER PHOTOGRAPH HOSTILE_FILE...
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { open } from './open.mjs';

const [url, output, photograph, ...hostile] = process.argv.slice(2);
const { browser, page, requests, errors, dialogs } = await open(url, { allowed: photograph ? url : null });
const stage = page.locator('#stage'), alpha = page.locator('#alpha'), wipe = page.locator('#wipe');

// As a hand does: the browser gets a file that is dropped on the page.
async function drop(file) {
  const contents = readFileSync(file).toString('base64');
  const transfer = await page.evaluateHandle(([name, data]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
    return transfer;
  }, [path.basename(file), contents]);
  await page.dispatchEvent('body', 'drop', { dataTransfer: transfer });
}
const isShown = (value) => page.waitForFunction(
  (value) => document.getElementById('stage').dataset.shown === value, value, { timeout: 120000 });
async function record(name) {
  await page.evaluate(() => Promise.all([...document.querySelectorAll('#stage img')].map((image) => image.decode())));
  await stage.screenshot({ path: path.join(output, `${name}.png`) });
  return page.evaluate(() => {
    const [stage, after] = ['stage', 'after'].map((id) => document.getElementById(id));
    const { a: zoom, e: x, f: y } = new DOMMatrix(getComputedStyle(after).transform);
    return {
      right: document.getElementById('right').textContent,
      split: stage.style.getPropertyValue('--split'),
      natural: [after.naturalWidth, after.naturalHeight],
      frame: after.src.slice(0, 4000),
      zoom,
      at: [x, y],
      under: [(500 - x) / zoom, (300 - y) / zoom],  // the pixel below a place of the stage
    };
  });
}

const seen = {};
if (photograph) await page.locator('#drop input').setInputFiles(photograph);
await isShown('0.5');
seen.start = await record('start');
seen.stage = await stage.evaluate((box) => [box.clientWidth, box.clientHeight]);
const box = await stage.boundingBox();

// The line is dragged to a quarter.
await page.mouse.move(box.x + box.width / 2, box.y + box.height / 3);
await page.mouse.down();
await page.mouse.move(box.x + box.width / 4, box.y + box.height / 3, { steps: 5 });
await page.mouse.up();
seen.wiped = await record('wiped');

// Alpha is dragged, past other values.
const track = await alpha.boundingBox();
await page.mouse.move(track.x + track.width / 2, track.y + track.height / 2);
await page.mouse.down();
await page.mouse.move(track.x + track.width * 0.74, track.y + track.height / 2, { steps: 8 });
await page.mouse.up();
await alpha.focus();
if (photograph) {  // to a value that is known, with the keys
  await alpha.evaluate((input) => { input.value = 84; });
  await page.keyboard.press('ArrowRight');
}
await isShown(photograph ? '0.85' : '0.75');
seen.end = await record('end');

if (photograph) {
  const [download] = await Promise.all([page.waitForEvent('download'), page.locator('#download').click()]);
  const file = path.join(output, 'downloaded.png');
  await download.saveAs(file);
  seen.download = { name: download.suggestedFilename(), path: file };
}

// The wheel zooms around the pointer; then the picture is moved.
await page.evaluate(() => scrollTo(0, 0));
await page.mouse.move(box.x + 500, box.y + 300);
await page.mouse.wheel(0, -400);
seen.zoomed = await record('zoomed');
await page.mouse.move(box.x + 100, box.y + 60);
await page.mouse.down();
await page.mouse.move(box.x + 130, box.y + 80, { steps: 3 });
await page.mouse.up();
seen.moved = await record('moved');

seen.told = {};
for (const file of hostile) {
  await drop(file);
  await page.waitForFunction(() => !document.getElementById('message').hidden);
  seen.told[path.basename(file)] = await page.locator('p#message').textContent();
  await page.locator('p#message').evaluate((message) => { message.hidden = true; });
}
// A refused upload is an error of the console too, which is none of the page.
seen.errors = errors.filter((text) => !/status of 4\d\d/.test(text));
seen.after = await record('after');
seen.overflow = [];
for (const width of [1200, 390]) {
  await page.setViewportSize({ width, height: 800 });
  await page.screenshot({ path: path.join(output, `page_${width}.png`), fullPage: true });
  seen.overflow.push(await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth));
}
// On a phone: one finger wipes, two fingers zoom, and then one finger moves the picture.
const devtools = await page.context().newCDPSession(page);
await devtools.send('Emulation.setTouchEmulationEnabled', { enabled: true, maxTouchPoints: 2 });
await page.locator('#zoom input').first().check({ force: true });
await stage.scrollIntoViewIfNeeded();
const place = await stage.boundingBox();
const [x, y] = [place.x + place.width / 2, place.y + place.height / 2];
const touch = (type, ...fingers) => devtools.send('Input.dispatchTouchEvent', {
  type, touchPoints: fingers.map((across, id) => ({ x: x + across, y, id })),
});
await touch('touchStart', 0);
await touch('touchMove', -place.width / 4);
await touch('touchEnd');
seen.fitted = await record('fitted');
await touch('touchStart', -30);
await touch('touchStart', -30, 30);
for (let apart = 40; apart <= 90; apart += 10) await touch('touchMove', -apart, apart);
await touch('touchEnd');
seen.pinched = await record('pinched');
await touch('touchStart', 80);
for (let across = 90; across <= 120; across += 10) await touch('touchMove', across);
await touch('touchEnd');
seen.pushed = await record('pushed');
console.log(JSON.stringify({ requests, dialogs, ...seen }, null, 1));
await browser.close();
