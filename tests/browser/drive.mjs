// Opens a report offline, uses it as a reader would, and prints what happened as JSON.
//
//   node drive.mjs REPORT.html OUTPUT_FOLDER
//
// The packages of package.json are looked for beside this file, or in the folder that the
// environment variable SR_JAX_BROWSER names (the one that holds node_modules).
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const [report, output] = process.argv.slice(2).map((name) => path.resolve(name));
const here = path.dirname(fileURLToPath(import.meta.url));
const require = createRequire(path.join(process.env.SR_JAX_BROWSER || here, 'package.json'));
const { chromium: playwright } = require('playwright-core');
const packaged = require('@sparticuz/chromium');
const chromium = packaged.default ?? packaged;

// Its own arguments switch web security off; here the page's policy has to hold. Without a
// sandbox, because root in a container has none.
const browser = await playwright.launch({
  executablePath: await chromium.executablePath(),
  args: ['--no-sandbox', '--disable-gpu', '--font-render-hinting=none'],
});
const context = await browser.newContext({ viewport: { width: 1200, height: 900 }, colorScheme: 'light' });
await context.setOffline(true);
const requests = [], errors = [], dialogs = [];
await context.route('**/*', (route) => {
  const url = route.request().url();
  if (url === pathToFileURL(report).href) return route.continue();
  requests.push(url.slice(0, 200));
  return route.abort();
});
const page = await context.newPage();
page.on('console', (message) => { if (message.type() === 'error') errors.push(message.text()); });
page.on('pageerror', (error) => errors.push(String(error)));
page.on('dialog', (dialog) => { dialogs.push(dialog.message()); dialog.dismiss(); });
const began = Date.now();
await page.goto(pathToFileURL(report).href);
const loaded = Date.now() - began;

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
    left: box.querySelector('.ta').textContent,
    right: box.querySelector('.tb').textContent,
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
console.log(JSON.stringify({ requests, errors, dialogs, loaded, states, views, columns, undecoded, overflowOnPhone, ...facts }, null, 1));
await browser.close();
