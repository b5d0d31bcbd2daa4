// Opens a report offline, uses it as a reader would, and prints what happened as JSON.
//
//   node drive.mjs REPORT.html OUTPUT_FOLDER
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { open } from './open.mjs';

const [report, output] = process.argv.slice(2).map((name) => path.resolve(name));
const { browser, page, requests, errors, dialogs, loaded } = await open(pathToFileURL(report).href);

const look = page.locator('details.image[open]').first();
const stage = look.locator('.stage'), range = look.locator('.divider');
const states = {};
async function record(name) {
  // Images are decoded after `src` is set; a picture taken earlier shows the last one.
  await stage.evaluate((box) => Promise.all([...box.querySelectorAll('img')].map((image) => image.decode())));
  await stage.screenshot({ path: path.join(output, `${name}.png`) });
  states[name] = await stage.evaluate((box) => ({
    clip: getComputedStyle(box.querySelector('.a')).clipPath,
    divide: box.querySelector('.divide').getBoundingClientRect().x - box.getBoundingClientRect().x,
    width: box.clientWidth,
    left: box.parentElement.querySelector('.ta').textContent,
    right: box.parentElement.querySelector('.tb').textContent,
    view: box.dataset.view,
    value: box.parentElement.querySelector('.divider').value,
    says: box.parentElement.querySelector('.divider').getAttribute('aria-valuetext'),
  }));
}

await page.screenshot({ path: path.join(output, 'page.png'), fullPage: true });
await stage.scrollIntoViewIfNeeded();
await record('start');
await range.evaluate((input) => {
  input.value = '25';
  input.dispatchEvent(new Event('input', { bubbles: true }));
});
await record('moved');
await range.focus();
for (let i = 0; i < 10; i += 1) await page.keyboard.press('ArrowRight');
await record('keyboard');
const box = await stage.boundingBox();
await page.mouse.click(box.x + box.width * 0.4, box.y + box.height / 2);
await record('clicked');
await page.mouse.move(box.x + box.width * 0.3, box.y + box.height / 2);
await page.mouse.down();
await page.mouse.move(box.x + box.width * 0.8, box.y + box.height / 2, { steps: 4 });
await page.mouse.up();
await page.mouse.move(box.x + box.width * 0.1, box.y + box.height / 2);
await record('dragged');
await look.locator('.sb').selectOption('lr');
await record('selected');
const views = await look.locator('.controls input').evaluateAll((inputs) => inputs.map((input) => input.value));
await look.locator('.controls input').last().check();
await record('window');

// A click on the first heading sorts; the second click turns the order.
const column = () => page.locator('#scores tbody').first().locator('tr:not(.set)').evaluateAll(
  (rows) => rows.map((row) => [row.cells[0].textContent, row.cells[1]?.textContent]));
const columns = [await column()];
for (let i = 0; i < 2; i += 1) {
  const button = page.locator('#scores .sort').first();
  if (await button.count()) await button.click();
  columns.push(await column());
}
// Unfold everything, one by one: each image has to come up, each curve has to be drawn.
await page.evaluate(() => { for (const fold of document.querySelectorAll('details')) fold.open = true; });
await page.waitForFunction(() => [...document.querySelectorAll('details.image')].every((one) => one.dataset.ready));
await page.waitForFunction(() => [...document.querySelectorAll('.chart')].every((one) => one.querySelector('svg .line[d], svg .broken')));
const undecoded = await page.evaluate(async () => {
  const results = await Promise.allSettled([...document.images].map((image) => image.decode()));
  return results.filter((result) => result.status === 'rejected').length;
});
const facts = await page.evaluate(() => ({
  images: document.images.length,
  comparators: document.querySelectorAll('.stage').length,
  lines: document.querySelectorAll('.chart > svg .line[d]').length,
  charts: document.querySelectorAll('.chart').length,
  broken: document.querySelectorAll('.chart .broken').length,
  title: document.title,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
}));
await page.setViewportSize({ width: 400, height: 800 });
await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
const overflowOnPhone = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
// What a phone shows: whether anything has to be scrolled sideways or is cut, and where HR is while
// each image of a strip is looked at.
await look.locator('.sa').evaluate((select) => {  // the last model, whose name may be long
  select.selectedIndex = select.length - 2;
  select.dispatchEvent(new Event('change'));
});
const sideways = await page.evaluate(() => [...document.querySelectorAll('main *')].filter((one) => {
  const { overflowX, textOverflow } = getComputedStyle(one);
  if (!one.clientWidth || one.matches('input, select, option')) return false;
  const isCut = one.scrollWidth > one.clientWidth + 1 && (overflowX !== 'visible' || textOverflow === 'ellipsis');
  return isCut && !one.matches('.divide');
}).map((one) => `${one.tagName}.${one.className}`));
const hrInSight = [];
for (const width of [400, 1200]) {
  await page.setViewportSize({ width, height: 800 });
  hrInSight.push(await page.evaluate(async () => {
    const seen = [];
    for (const strip of [...document.querySelectorAll('.strip')].slice(0, 6)) {
      const hr = strip.querySelector('[data-key=hr]');
      for (const image of strip.querySelectorAll('img')) {
        image.scrollIntoView({ block: 'center', behavior: 'instant' });
        await new Promise((done) => requestAnimationFrame(done));
        const { top, bottom, left, right } = hr.getBoundingClientRect();
        seen.push(top >= 0 && bottom <= innerHeight && left >= 0 && right <= innerWidth);
      }
    }
    return seen;
  }));
}
console.log(JSON.stringify({ sideways, hrInSight, requests, errors, dialogs, loaded, states, views, columns, undecoded, overflowOnPhone, ...facts }, null, 1));
await browser.close();
